"""A trace through one store whose requests take no time: what an evictor saves without queues and batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

from strop.core.blocks import KVStore
from strop.core.errors import StropError
from strop.core.evict.worth import RecomputeCost
from strop.serve.base import Trace


@dataclass(frozen=True)
class Replay:
    """What a store saved of a trace's prefill."""

    requests: int
    request_hits: int
    """Requests that found at least one block."""
    blocks: int
    block_hits: int
    """Blocks that need not be computed."""
    seconds: float
    """Of prefill, by the cost model."""
    uncached_s: float
    """The same without any cache."""

    @property
    def recomputed(self) -> float:
        """Seconds over those without a cache."""
        return self.seconds / self.uncached_s


def replay(trace: Trace, store: KVStore, cost: RecomputeCost, holes: bool = True) -> Replay:
    """Serve every request at once when it arrives; `holes`: whether blocks behind a missing one are used.

    A request larger than the store is computed whole and leaves the store as it was. A block that is partly
    filled counts as a whole one.
    """
    if not trace.hashed:
        raise StropError(f"the trace {trace.name} names no blocks: take one that does, like Mooncake's")
    requests = request_hits = total = hits = 0
    seconds = uncached = 0.0
    for now, blocks in arrivals(trace):
        missing = [(run.start, run.stop) for run in store.match(blocks) if not run.resident]
        if missing and not holes:
            missing = [(missing[0][0], len(blocks))]
        if store.acquire(blocks, 0, now):
            store.release(blocks, 0, now)
        else:
            missing = [(0, len(blocks))]
        found = len(blocks) - sum(stop - start for start, stop in missing)
        requests, request_hits = requests + 1, request_hits + (found > 0)
        total, hits = total + len(blocks), hits + found
        seconds += sum(cost.run(start, stop) for start, stop in missing)
        uncached += cost.run(0, len(blocks))
    return Replay(requests, request_hits, total, hits, seconds, uncached)


def arrivals(trace: Trace) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Time and blocks of every request where requests take no time, in order of time."""
    heap = [(job.arrival, order, job) for order, job in enumerate(trace.jobs)]
    heapify(heap)
    while heap:
        now, order, job = heap[0]
        yield now, job.request.blocks
        if job.next is None:
            heappop(heap)
        else:
            heapreplace(heap, (now + job.gap, order, job.next))
