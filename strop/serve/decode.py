"""An instance that decodes, for requests whose KV comes from elsewhere.

A request first waits for memory for all of its tokens, so that none is ever put back; then its KV is sent,
and it joins the batch where the iteration under way ends.
"""

from collections import deque
from collections.abc import Callable

from strop.core.blocks import KVStore
from strop.serve.base import Job
from strop.serve.batch import Batch
from strop.serve.events import Clock
from strop.serve.instance import Flight, Pool
from strop.serve.latency import Latency


class Decode:
    """One instance; `fetch` is called with each flight that has room, `done` with each that has ended."""

    def __init__(
        self,
        number: int,
        pool: Pool,
        latency: Latency,
        store: KVStore,
        block: int,
        most: int,
        clock: Clock,
        fetch: Callable[[Flight], None],
        done: Callable[[Flight], None],
    ) -> None:
        self.number, self.pool, self.latency, self.store = number, pool, latency, store
        self.block, self.most, self.clock, self.fetch, self.done = block, most, clock, fetch, done
        self.batch = Batch(latency)
        self.waiting: deque[Flight] = deque()
        self.coming: list[Flight] = []
        """Arrived, to join at the next boundary."""
        self._promised = self._promised_tokens = 0
        self._needed = 0
        """Tokens of those that wait for room."""
        self._version, self._planned, self._extra = 0, 0, 0.0

    def submit(self, flight: Flight) -> None:
        """Take a request in, to be sent here when there is room."""
        self._queue(self.waiting, flight)
        self._needed += self.tokens(flight)
        self._admit()
        self._show()

    def join(self, flight: Flight) -> None:
        """Its KV is here."""
        self.coming.append(flight)
        self._wake()

    def tokens(self, flight: Flight) -> int:
        """Tokens of memory that a request needs until its end."""
        return (len(flight.job.request.blocks) + self.anonymous(flight)) * self.block

    def anonymous(self, flight: Flight) -> int:
        """Blocks that have no hash: those of its answer, and of a prompt without hashes."""
        whole = -(-(flight.job.request.prompt + flight.job.output) // self.block)
        return whole - len(flight.job.request.blocks)

    def _queue(self, queue: deque[Flight], flight: Flight) -> None:
        """Let a request wait: behind all others."""
        queue.append(flight)

    def _admit(self) -> None:
        """Give room to those that wait, in order."""
        while self.waiting and self.batch.size + self._promised < self.most:
            flight = self.waiting[0]
            request = flight.job.request
            self._look(flight)
            if not self.store.acquire(request.blocks, self.anonymous(flight), self.clock.now):
                break
            self.waiting.popleft()
            self._needed -= self.tokens(flight)
            self._promised += 1
            self._promised_tokens += request.prompt
            flight.room = self.clock.now
            self.fetch(flight)

    def _look(self, flight: Flight) -> None:
        """See what is here already of a request's prompt."""
        request = flight.job.request
        flight.hit = min(self.store.hits(request.blocks) * self.block, request.prompt)

    def _wake(self) -> None:
        """Somebody is here: the iteration under way, if any, is the last without them."""
        batch, now = self.batch, self.clock.now
        if not self._planned:
            batch.start(now)
            self._between()
        elif self._planned > 1:
            n = batch.done_by(now)
            if n < self._planned:
                batch.advance(n)
                self._schedule(1)

    def _boundary(self, version: int) -> None:
        """The iterations that were planned have been made."""
        if version != self._version:
            return
        self.batch.advance(self._planned, self._extra)
        for flight in self.batch.leave():
            self._end(flight)
        self._between()

    def _between(self) -> None:
        """Between two iterations: take in who has come, and plan up to the next change."""
        come = self.coming
        if come:
            self.coming = []
            self._promised -= len(come)
            self._promised_tokens -= sum(flight.job.request.prompt for flight in come)
            self._take_in(come)
        self._admit()
        self._plan()
        self._show()

    def _take_in(self, come: list[Flight]) -> None:
        """Decode these too from now on."""
        for flight in come:
            self.batch.join(flight, flight.job.request.prompt, flight.job.output)
        first = self.batch.time + self.batch.step()
        for flight in come:
            flight.first = first

    def _plan(self) -> None:
        """Nothing changes before a request ends, as far as is known."""
        self._schedule(self.batch.until_end() if self.batch.size else 0)

    def _schedule(self, iterations: int, extra: float = 0.0) -> None:
        """Make so many iterations, the first longer by `extra` seconds."""
        self._version += 1
        self._planned, self._extra = iterations, extra
        if not iterations:
            return
        end = self.batch.time + self.batch.seconds(iterations) + extra
        self.clock.at(max(end, self.clock.now), self._boundary, self._version)

    def _end(self, flight: Flight) -> None:
        flight.ended = self.batch.time
        self._release(flight)
        self.pool.hear(flight.job.output)
        self.done(flight)

    def _release(self, flight: Flight) -> None:
        """Cache its blocks, and those that its answer filled as the next turn will ask for them."""
        request, now = flight.job.request, self.clock.now
        said = spoken(flight.job, self.block)
        if not said:
            self.store.release(request.blocks, self.anonymous(flight), now)
            return
        self.store.release((), self.anonymous(flight), now)
        held = self.store.acquire(said, 0, now)
        self.store.release(request.blocks, 0, now)
        if held:
            self._leave(flight, said)
            self.store.release(said, 0, now)

    def _leave(self, flight: Flight, said: tuple[int, ...]) -> None:
        """The next turn will ask for these blocks, which are still in use."""

    def _show(self) -> None:
        """Write what a router sees."""
        live, i, batch = self.pool.live, self.number, self.batch
        running, waiting = batch.size + self._promised, len(self.waiting)
        live.free[i] = self.store.free * self.block - self._needed
        live.running[i] = running
        live.waiting[i] = waiting
        live.queued[i] = self._needed
        held = batch.held + self._promised_tokens
        fixed, token = self.latency.decode(running + 1)
        live.step[i] = fixed + token * held
        self.pool.until[i] = 0.0
        if running and (waiting or running >= self.most):
            fixed, token = self.latency.decode(running)
            seconds = self.pool.answer * (fixed + token * held)
            self.pool.until[i] = self.clock.now + (waiting + 1) * seconds / running


def spoken(job: Job, block: int) -> tuple[int, ...]:
    """Blocks that a prompt and its answer have filled, as the next turn names them; none without one."""
    if job.next is None:
        return ()
    whole, blocks = job.request.prompt // block, job.next.request.blocks
    if blocks[:whole] != job.request.blocks[:whole]:
        return ()
    return blocks[: min(job.request.prompt + job.output, job.next.request.prompt) // block]
