"""Splitwise with its mixed pool: instances that prefill and instances that decode are lent to the other role.

A request is given both of its instances when it comes (arXiv 2311.18677, the rule as its authors' simulator
has it). Its prompt goes where the fewest tokens are pending, unless that queue would exceed a bound; its
answer where the least memory is scheduled, unless that is full. Where its pool has no such instance, the
mixed pool is asked, then the best of the other pool is lent: it joins the mixed pool and returns when nothing
is left for it to do. Where that has none either, the instance with the fewest tokens pending does both.

As there, memory is scheduled for a whole answer, whose length the rule therefore knows. Differs: an instance
is full, too, where no place is left of those that it decodes in, and takes no prompt that its memory does not
hold; memory and place are taken when they are scheduled, so that no two instances wait for one another, and a
block counts as there from then.
"""

from collections.abc import Callable, Sequence

import numpy as np

from strop.core.blocks import KVStore
from strop.core.chunks import BatchPolicy
from strop.serve.base import Endpoints
from strop.serve.decode import Decode
from strop.serve.events import Clock
from strop.serve.instance import Flight, Pool
from strop.serve.latency import Latency
from strop.serve.mixed import Mixed


class Lendable(Mixed):
    """An instance for either phase of a request, or both.

    While nothing decodes here, prompts are computed whole, one after another, as where there is nothing else;
    beside those that decode, in chunks. `send` is called with each flight whose prompt is computed and that
    decodes elsewhere, `done` with each that has ended here.
    """

    def __init__(
        self,
        number: int,
        pool: Pool,
        latency: Latency,
        store: KVStore,
        block: int,
        most: int,
        clock: Clock,
        send: Callable[[Flight], None],
        done: Callable[[Flight], None],
        chunk: BatchPolicy,
        holes: bool,
    ) -> None:
        how = (chunk, holes, "fcfs", None, False)
        super().__init__(number, pool, latency, store, block, most, clock, done, *how)
        self.send = send
        self._pending = 0
        """Tokens of prompts that are not computed."""
        self._leaving = 0
        """Prompts for elsewhere whose KV has not left."""
        self._joined: list[Flight] = []
        """Those whose first iteration here is about to be planned, of prompts from elsewhere."""

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do, nor on its way here."""
        return not (self.batch.size or self._promised or self._leaving or self.waiting)

    def submit(self, flight: Flight) -> None:
        """Take both phases of a request in; it waits for room."""
        self._pending += flight.job.request.prompt
        super().submit(flight)

    def compute(self, flight: Flight) -> None:
        """Take in a prompt that decodes elsewhere and for which there is room."""
        self._look(flight)
        self._hold(flight, self.unhashed(flight))
        self._leaving += 1
        self._pending += flight.job.request.prompt
        self._left += self.latency.prefill(flight.runs)
        self.prompts.append(flight)
        self._wake()
        self._show()

    def expect(self, flight: Flight) -> None:
        """Keep room and a place, which there are, for a request whose KV will come from elsewhere."""
        Decode._look(self, flight)
        self._hold(flight, self.anonymous(flight))
        self._promised += 1
        self._promised_tokens += flight.job.request.prompt
        self._show()

    def release(self, flight: Flight) -> None:
        """The KV of a prompt has left: the blocks stay as cached ones."""
        self.store.release(flight.job.request.blocks, self.unhashed(flight), self.clock.now)
        self._leaving -= 1
        self._admit()
        if self.prompts:
            self._wake()
        self._show()

    def unhashed(self, flight: Flight) -> int:
        """Blocks of the prompt that have no hash."""
        request = flight.job.request
        return -(-request.prompt // self.block) - len(request.blocks)

    def _leave(self, flight: Flight, said: tuple[int, ...]) -> None:
        """As where instances decode alone: nobody is told of a tool's call."""

    def _hold(self, flight: Flight, anonymous: int) -> None:
        if not self.store.acquire(flight.job.request.blocks, anonymous, self.clock.now):
            raise ValueError(f"request {flight.job.request.id} was scheduled where there is no room")

    def _boundary(self, version: int) -> None:
        """Prompts for elsewhere, once computed, pass the other stages and are sent."""
        if version == self._version:
            computed = self._finished
            self._finished = [flight for flight in computed if flight.decode == self.number]
            for flight in computed:
                self._pending -= flight.job.request.prompt
                if flight.decode != self.number:
                    rest = (self.latency.stages - 1) * flight.recomputed
                    self.clock.at(self.clock.now + rest, self._computed, flight)
        super()._boundary(version)

    def _computed(self, flight: Flight) -> None:
        flight.computed = flight.room = self.clock.now
        self.send(flight)

    def _take_in(self, come: list[Flight]) -> None:
        """Those from elsewhere get their first token in the next iteration."""
        super()._take_in([flight for flight in come if flight.prefill == self.number])
        self._joined = [flight for flight in come if flight.prefill != self.number]
        for flight in self._joined:
            self.batch.join(flight, flight.job.request.prompt, flight.job.output)

    def _plan(self) -> None:
        if self.prompts and not self.batch.size:
            whole = sum(n for n, _ in self.prompts[0].runs)
            self._schedule(1, self.latency.prefill(self._chunk(whole)) - self.batch.step())
        else:
            super()._plan()
        for flight in self._joined:
            flight.first = self.batch.time + self.batch.step() + self._extra
        self._joined = []

    def _show(self) -> None:
        super()._show()
        self.pool.live.queued[self.number] = self._pending


class MixedPool:
    """Which instances take a request's phases, and who is lent.

    What instances have been given is known at once, whatever the age of their reports: it is from here.
    """

    def __init__(
        self, bound: float, instances: Sequence[Lendable], prompts: np.ndarray, live: Endpoints
    ) -> None:
        """`prompts` says of each instance whether it is of the prompt pool, `[E]`."""
        self.bound, self.instances, self.prompts, self.live = bound, instances, prompts, live
        self.most = np.array([one.most for one in instances])
        self._lent = np.zeros(len(instances), dtype=bool)

    def mixed(self) -> np.ndarray:
        """Who is in the mixed pool, `[E]`; those with nothing left to do have returned."""
        for number in np.flatnonzero(self._lent):
            self._lent[number] = not self.instances[number].idle
        return self._lent

    def place(self, flight: Flight) -> None:
        """Give a request to one instance or two."""
        flight.prefill, flight.decode = self._pair(flight)
        if flight.prefill == flight.decode:
            self.instances[flight.decode].submit(flight)
        else:
            self.instances[flight.decode].expect(flight)
            self.instances[flight.prefill].compute(flight)

    def _pair(self, flight: Flight) -> tuple[int, int]:
        live, request, some = self.live, flight.job.request, self.instances[0]
        part = (len(request.blocks) + some.unhashed(flight)) * some.block
        whole = some.tokens(flight)
        requests = live.running + live.waiting
        pending = live.queued + requests
        short = (live.queued == 0) | (live.queued + request.prompt <= self.bound)
        prompt = self._best(short & (live.free >= part), pending, self.prompts)
        room = (live.free >= whole) & (requests < self.most)
        answer = self._best(room, live.capacity - live.free, ~self.prompts)
        if prompt is None or answer is None:
            both = int(np.where(live.capacity >= whole, pending, np.inf).argmin())
            return both, both
        self._lent[prompt] |= not self.prompts[prompt]
        self._lent[answer] |= self.prompts[answer]
        return prompt, answer

    def _best(self, fits: np.ndarray, load: np.ndarray, own: np.ndarray) -> int | None:
        """The least loaded that fits: of the pool, of the mixed pool, or of the other pool."""
        mixed = self.mixed()
        for pool in (own & ~mixed, mixed, ~own & ~mixed):
            found = np.flatnonzero(fits & pool)
            if len(found):
                return int(found[load[found].argmin()])
        return None
