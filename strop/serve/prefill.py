"""An instance that computes prompts, one after another in the order in which they came.

Cached blocks are not computed: all of them where holes may be filled, else those before the first hole. The
last token always is, for without it there is no next one.
"""

from collections import deque
from collections.abc import Callable

from strop.core.blocks import KVStore
from strop.serve.base import Request
from strop.serve.events import Clock
from strop.serve.instance import Flight, Pool
from strop.serve.latency import Latency, Run


class Prefill:
    """One instance; `done` is called with each flight whose prompt is computed."""

    def __init__(
        self,
        number: int,
        pool: Pool,
        latency: Latency,
        store: KVStore,
        block: int,
        holes: bool,
        clock: Clock,
        done: Callable[[Flight], None],
    ) -> None:
        self.number, self.pool, self.latency, self.store = number, pool, latency, store
        self.block, self.holes, self.clock, self.done = block, holes, clock, done
        self.waiting: deque[Flight] = deque()
        self._free_at = 0.0
        """When the next prompt may begin."""
        self._asked = False

    def submit(self, flight: Flight) -> None:
        """Take a request in."""
        self.waiting.append(flight)
        live, prompt = self.pool.live, flight.job.request.prompt
        live.waiting[self.number] += 1
        live.queued[self.number] += prompt
        self.pool.ahead[self.number] += self.latency.prefill([(prompt, 0)])
        self._next()

    def release(self, flight: Flight) -> None:
        """Its KV has left: the blocks stay as cached ones."""
        request = flight.job.request
        self.store.release(request.blocks, self._anonymous(flight), self.clock.now)
        live = self.pool.live
        live.running[self.number] -= 1
        live.free[self.number] = self.store.free * self.block
        self._next()

    def _next(self) -> None:
        """Begin the next prompt, or be called when it may begin."""
        if not self.waiting or self._asked:
            return
        if self._free_at > self.clock.now:
            self._asked = True
            self.clock.at(self._free_at, self._asked_for)
            return
        self._begin()

    def _asked_for(self) -> None:
        self._asked = False
        self._next()

    def _begin(self) -> None:
        """Compute the next prompt, unless there is no memory for it: then what is released calls again."""
        flight, now = self.waiting[0], self.clock.now
        request = flight.job.request
        flight.runs = to_compute(self.store, request, self.block, self.holes)
        if not self.store.acquire(request.blocks, self._anonymous(flight), now):
            return
        self.waiting.popleft()
        seconds = self.latency.prefill(flight.runs)
        flight.begun, flight.recomputed = now, seconds
        flight.reused = request.prompt - sum(n for n, _ in flight.runs)
        self._free_at = now + seconds
        live = self.pool.live
        live.waiting[self.number] -= 1
        live.queued[self.number] -= request.prompt
        live.running[self.number] += 1
        live.free[self.number] = self.store.free * self.block
        self.pool.until[self.number] = self._free_at
        ahead = self.pool.ahead[self.number] - self.latency.prefill([(request.prompt, 0)])
        self.pool.ahead[self.number] = ahead if self.waiting else 0.0
        self.clock.at(now + seconds * self.latency.stages, self._end, flight)
        self._next()

    def _end(self, flight: Flight) -> None:
        flight.computed = self.clock.now
        self.done(flight)

    def _anonymous(self, flight: Flight) -> int:
        """Blocks of the prompt that have no hash."""
        request = flight.job.request
        return 0 if request.blocks else -(-request.prompt // self.block)


def to_compute(store: KVStore, request: Request, block: int, holes: bool) -> list[Run]:
    """Tokens of a prompt that are not in a store, piece by piece, each with the tokens before it."""
    if not holes or not request.blocks:
        held = min(store.hits(request.blocks) * block, request.prompt - 1)
        return [(request.prompt - held, held)]
    runs = [
        (min(run.stop * block, request.prompt) - run.start * block, run.start * block)
        for run in store.match(request.blocks)
        if not run.resident
    ]
    if not runs or sum(runs[-1]) < request.prompt:
        runs.append((1, request.prompt - 1))
    return runs
