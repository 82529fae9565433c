"""AsymCache (arXiv 2606.02964, 4.4 and 4.5): the least chance of reuse times cost of recomputing goes.

Both branches of f give a block a key that time does not change, so two heaps hold all blocks, and the victim
is the smaller of their tops: exact, since a minimum over blocks of a minimum over branches may be taken in
any order.

Left out: balanced trees; heaps delete lazily. Blocks with equal keys leave in the order in which they were
freed, which is tail first, so that an equal cost everywhere gives LRU. Ours, for want of numbers: the windows
of lambda and the factor of a tool call.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush

import numpy as np

from strop.core.evict.base import Evictor
from strop.core.evict.worth import RecomputeCost, Reuse

WINDOW, EVERY = 1000, 64
"""Hits over which lifespans are averaged, and evictions between two settings of lambda."""
TOOL = math.log(4.0)
"""What a call of a tool adds to ln f."""
QUANTILE = 0.99
"""Of reuse times, that L is tuned to."""
FAR = 1e6
"""ln f of a new block at which keys begin to lose digits and count from a later epoch."""

Entry = tuple[float, int, int]
"""Key, how many blocks were freed before, block."""


class AsymCache(Evictor):
    """Two heaps over the blocks that nobody uses; `adapt` moves f's turning point to the mean lifespan."""

    def __init__(self, cost: RecomputeCost, reuse: Reuse, adapt: bool = True) -> None:
        self.cost, self.adapt = cost, adapt
        self.reuse, self.log_lambda, self._epoch = reuse, 0.0, 0.0
        self._per_alpha = self._per_beta = self._tau0 = 0.0
        self.lifespan = 0.0
        """Mean seconds between uses of a block, of the last hits."""
        self._hits = self._evictions = self._freed = 0
        self._called: set[int] = set()
        self._live: dict[int, tuple[int, float, float]] = {}
        """Of each block: blocks freed before it, when it was freed, ln of its cost."""
        self._flat: list[Entry] = []
        self._steep: list[Entry] = []
        self._worth: list[float] = []
        """ln of the cost by place."""
        self.use(reuse)

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, block: int) -> bool:
        return block in self._live

    def on_ref_zero(self, block: int, index: int, now: float) -> None:
        while index >= len(self._worth):
            self._worth.append(math.log(self.cost(len(self._worth))))
        worth = self._worth[index]
        if block in self._called:
            self._called.remove(block)
            worth += TOOL
        self._freed = order = self._freed + 1
        self._live[block] = order, now, worth
        since = now - self._epoch
        heappush(self._flat, (worth + since * self._per_alpha, order, block))
        heappush(self._steep, (worth + (since + self._tau0) * self._per_beta, order, block))
        if max(len(self._flat), len(self._steep)) > 2 * len(self._live) + EVERY:
            self._rebuild(self._epoch)
        elif since * self._per_beta > FAR:
            self._rebuild(now)

    def on_hit(self, block: int, now: float) -> None:
        _, freed, _ = self._live.pop(block)
        self._hits += 1
        self.lifespan += (now - freed - self.lifespan) / min(self._hits, WINDOW)

    def victim(self, now: float) -> int:
        flat, steep = self._top(self._flat), self._top(self._steep)
        since = now - self._epoch
        first = flat[0] - since * self._per_alpha <= steep[0] - since * self._per_beta + self.log_lambda
        block = heappop(self._flat if first else self._steep)[2]
        del self._live[block]
        self._evictions += 1
        if self.adapt and self._hits and self._evictions % EVERY == 0:
            self.log_lambda = self.reuse.log_lambda(self.lifespan)
        return block

    def on_tool_call(self, blocks: Sequence[int], now: float) -> None:
        self._called.update(blocks)

    def tune(self, reuse_s: Sequence[float], now: float) -> None:
        """Set L to the 99th percentile of reuse times."""
        if len(reuse_s) and (lifespan := float(np.quantile(reuse_s, QUANTILE))) > 0:
            self.use(replace(self.reuse, L=lifespan))

    def use(self, reuse: Reuse) -> None:
        """Judge all blocks by another reuse function from now on."""
        self.reuse, self.log_lambda = reuse, 0.0
        self._per_alpha, self._per_beta, self._tau0 = 1 / reuse.alpha, 1 / reuse.beta, reuse.tau0
        self._rebuild(next((freed for _, freed, _ in reversed(self._live.values())), 0.0))

    def _rebuild(self, epoch: float) -> None:
        """Both heaps anew, with times counted from an epoch, without what was deleted."""
        self._epoch = epoch
        self._flat, self._steep = [], []
        for block, (order, freed, worth) in self._live.items():
            since = freed - epoch
            self._flat.append((worth + since * self._per_alpha, order, block))
            self._steep.append((worth + (since + self._tau0) * self._per_beta, order, block))
        heapify(self._flat)
        heapify(self._steep)

    def _top(self, heap: list[Entry]) -> Entry:
        """The smallest entry that still holds, at the root of the heap."""
        live = self._live
        while heap:
            entry = heap[0]
            held = live.get(entry[2])
            if held is not None and held[0] == entry[1]:
                return entry
            heappop(heap)
        raise IndexError("no block may be evicted")
