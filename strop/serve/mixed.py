"""An instance that computes prompts and decodes in the same iterations: chunked prefill.

Every iteration gives each request that decodes one token and computes some tokens of the prompts that wait,
in order; cached tokens inside a chunk cost nothing but attention. Iterations without prompts are one sum.
"""

from collections import deque
from collections.abc import Callable

from strop.serve.base import BatchPolicy
from strop.serve.decode import Decode
from strop.serve.events import Clock
from strop.serve.instance import Flight, Pool
from strop.serve.latency import Latency, Run
from strop.serve.prefill import to_compute
from strop.serve.store import KVStore


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
    ) -> None:
        self.prompts: deque[Flight] = deque()
        """Those that have room and are not computed yet."""
        super().__init__(number, pool, latency, store, block, most, clock, self.prompts.append, done)
        self.chunk, self.holes = chunk, holes
        self._finished: list[Flight] = []
        """Those whose last chunk is in the iteration under way."""

    def submit(self, flight: Flight) -> None:
        super().submit(flight)
        if self.prompts:
            self._wake()

    def _look(self, flight: Flight) -> None:
        """Nothing is sent; what is here is not computed."""
        request = flight.job.request
        flight.runs = to_compute(self.store, request, self.block, self.holes)
        flight.reused = request.prompt - sum(n for n, _ in flight.runs)

    def _boundary(self, version: int) -> None:
        if version == self._version:
            self.coming, self._finished = self._finished, []
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
            n, before = flight.runs.pop(0)
            part = min(n, budget)
            budget -= part
            taken.append((part, before))
            flight.recomputed += self.latency.prefill(taken[-1:])
            if part < n:
                flight.runs.insert(0, (n - part, before + part))
            elif not flight.runs:
                self._finished.append(self.prompts.popleft())
        return taken

    def _show(self) -> None:
        super()._show()
        queued = sum(n for flight in self.prompts for n, _ in flight.runs)
        queued += sum(flight.job.request.prompt for flight in self.waiting)
        until = self.pool.until
        until[self.number] = max(until[self.number], self.clock.now) + self.latency.prefill([(queued, 0)])
