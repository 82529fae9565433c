"""An instance that computes prompts and decodes in the same iterations: chunked prefill.

Every iteration gives each request that decodes one token and computes some tokens of the prompts that wait,
in order; cached tokens inside a chunk cost nothing but attention. Iterations without prompts are one sum.

Where Continuum (arXiv 2511.02230) is asked for, KV stays pinned while a tool runs, and a pin that is there
when the next turn comes lasts until that is taken in. With programs in order, such turns go first, then those
whose program began first; a prompt that has begun is finished before.
"""

from collections import deque
from collections.abc import Callable
from math import inf

from strop.core.blocks import KVStore
from strop.core.chunks import BatchPolicy
from strop.serve.decode import Decode
from strop.serve.events import Clock
from strop.serve.instance import Flight, Pool
from strop.serve.latency import Latency, Run
from strop.serve.pinning import ContinuumTTL
from strop.serve.prefill import to_compute

RECENTLY, EVERY = 1000, 64
"""Returns of sessions that reuse times are taken from, and those between two times that the evictor hears."""


class Mixed(Decode):
    """One instance; `done` is called with each flight that has ended."""

    def __init__(
        self,
        number: int,
        pool: Pool,
        latency: Latency,
        store: KVStore,
        block: int,
        most: int,
        clock: Clock,
        done: Callable[[Flight], None],
        chunk: BatchPolicy,
        holes: bool,
        order: str,
        ttl: ContinuumTTL | None,
        tune: bool,
    ) -> None:
        """`ttl`: how long KV is pinned, None for never; `tune`: whether the evictor hears of reuse times."""
        self.prompts: deque[Flight] = deque()
        """Those that have room and are not computed yet."""
        super().__init__(number, pool, latency, store, block, most, clock, self._compute, done)
        self.chunk, self.holes, self.order, self.ttl = chunk, holes, order, ttl
        self.tune, self._away, self._returned = tune, deque[float](maxlen=RECENTLY), 0
        self._finished: list[Flight] = []
        """Those whose last chunk is in the iteration under way."""
        self._unread = self._left = 0.0
        """Seconds of the prompts that wait for room, and of what is left of those in `prompts`."""

    def submit(self, flight: Flight) -> None:
        if flight.before is not None:
            self._return(flight, flight.before)
        self._unread += self._whole(flight)
        super().submit(flight)
        if self.prompts:
            self._wake()

    def _return(self, flight: Flight, before: Flight) -> None:
        """Learn how long a session was away, and keep what is pinned until its turn."""
        now, session, away = self.clock.now, flight.job.request.session, self.clock.now - before.ended
        if self.ttl is not None and before.job.request.tool_call:
            self.ttl.observe(away)
        self._away.append(away)
        self._returned += 1
        if self.tune and self._returned % EVERY == 0:
            self.store.evictor.tune(self._away, now)
        until, blocks = self.store.pinned.get(session, (0.0, ()))
        flight.kept = until > now
        if flight.kept:
            self.store.pin(session, blocks, inf, now)

    def _compute(self, flight: Flight) -> None:
        """It has room: let its prompt wait to be computed."""
        self.store.unpin(flight.job.request.session, self.clock.now)
        self._unread = self._unread - self._whole(flight) if self.waiting else 0.0
        self._left += self.latency.prefill(flight.runs)
        self._queue(self.prompts, flight)

    def _queue(self, queue: deque[Flight], flight: Flight) -> None:
        place = len(queue)
        if self.order == "program":
            while place and self._may_pass(flight, queue[place - 1]):
                place -= 1
        queue.insert(place, flight)

    def _may_pass(self, flight: Flight, other: Flight) -> bool:
        """Whether it comes first by its program, and reuses nothing that the other has yet to compute."""
        if _turn(flight) >= _turn(other):
            return False
        if not other.runs:
            return True
        first = other.runs[0][1] // self.block
        missing = slice(first, first + 1)
        asked = flight.job.request.blocks[missing]
        return not asked or asked != other.job.request.blocks[missing]

    def _leave(self, flight: Flight, said: tuple[int, ...]) -> None:
        """After a call of a tool, pin what was said if that pays, or else let the evictor know."""
        request, store, now = flight.job.request, self.store, self.clock.now
        if not request.tool_call:
            return
        saved = self.latency.prefill([(len(said) * self.block, 0)])
        keep = self.ttl.ttl(saved, len(said) / store.capacity) if self.ttl is not None else 0.0
        if keep > 0:
            store.pin(request.session, said, now + keep, now)
        else:
            store.evictor.on_tool_call(said, now)

    def _look(self, flight: Flight) -> None:
        """Nothing is sent; what is here is not computed."""
        request = flight.job.request
        flight.runs = to_compute(self.store, request, self.block, self.holes)
        flight.reused = request.prompt - sum(n for n, _ in flight.runs)

    def _boundary(self, version: int) -> None:
        if version == self._version:
            self.coming += self._finished
            self._finished = []
        super()._boundary(version)

    def _take_in(self, come: list[Flight]) -> None:
        """The iteration that computed the end of a prompt gave its first token."""
        for flight in come:
            flight.computed = flight.room = flight.moved = flight.first = self.batch.time
            if flight.job.output > 1:
                self.batch.join(flight, flight.job.request.prompt + 1, flight.job.output - 1)
            else:
                self._end(flight)

    def _plan(self) -> None:
        """While there are prompts, the next iteration carries a chunk of them."""
        if self.prompts:
            self._schedule(1, self.latency.prefill(self._chunk(self.chunk.chunk(self.batch.size))))
        else:
            super()._plan()

    def _chunk(self, budget: int) -> list[Run]:
        """So many tokens of the prompts, in order."""
        taken: list[Run] = []
        while self.prompts and budget:
            flight = self.prompts[0]
            if not flight.recomputed:
                flight.begun = self.batch.time
            self._left -= self.latency.prefill(flight.runs)
            n, before = flight.runs.pop(0)
            part = min(n, budget)
            budget -= part
            taken.append((part, before))
            flight.recomputed += self.latency.prefill(taken[-1:])
            if part < n:
                flight.runs.insert(0, (n - part, before + part))
            elif not flight.runs:
                self._finished.append(self.prompts.popleft())
            self._left = self._left + self.latency.prefill(flight.runs) if self.prompts else 0.0
        return taken

    def _whole(self, flight: Flight) -> float:
        """Seconds of a prompt of which nothing is cached."""
        return self.latency.prefill([(flight.job.request.prompt, 0)])

    def _show(self) -> None:
        super()._show()
        self.pool.ahead[self.number] = self._left + self._unread


def _turn(flight: Flight) -> tuple[bool, bool, float]:
    """What programs in order are sorted by: the prompt that has begun, those with a pin, their beginnings."""
    return not flight.recomputed, not flight.kept, flight.since
