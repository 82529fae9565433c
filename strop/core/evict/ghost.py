"""Ghost selection: caches of names only try several settings, and the real one follows the cheapest.

AsymCache (arXiv 2606.02964) with a lifespan too long for the cache keeps what nobody wants and loses to LRU.
Which setting suits a workload shows only when each is run, and that takes no KV, just hashes.

Not in the paper. Ghosts see a share of the blocks, chosen by hash, and have that share of the room (SHARDS,
Waldspurger et al., FAST 2015): costs add over blocks where holes may be filled, so the share's costs tell.
"""

from collections import deque
from dataclasses import replace

import numpy as np

from strop.core.evict.asymcache import AsymCache
from strop.core.evict.base import Evictor
from strop.core.evict.lru import LRU
from strop.core.evict.worth import RecomputeCost, Reuse

QUANTILES = (0.9, 0.99)
SETTINGS = tuple((p, quantile) for p in (0.1, 0.5, 0.9, 0.99) for quantile in QUANTILES)
"""Chance of reuse at the lifespan, and which quantile of reuse times that is."""
UNSEEN, SHORTEST = 60.0, 1e-3
"""Seconds that a lifespan is taken for before any block was used twice, and the least that it may be."""
ROOM = 256
"""Blocks that a ghost holds at most, where the cache holds more."""
HISTORY, OFTEN = 64, 4
"""Uses that are remembered, in rooms of a ghost; choices made while the store could be filled once."""
SCATTER = 0x9E3779B97F4A7C15
"""Odd multiplier that spreads hashes (Knuth, 6.4)."""

Freed = list[tuple[int, int]]
"""Blocks of one sequence and their places, the last one first."""


class _Ghost:
    """A cache of names under one evictor, and the seconds that it would have recomputed lately."""

    def __init__(self, evictor: LRU | AsymCache, cost: RecomputeCost) -> None:
        self.evictor, self.cost = evictor, cost
        self.seconds = 0.0

    def serve(self, freed: Freed, room: int, now: float) -> None:
        """A sequence is looked up, what is missing computed, and all of it cached."""
        evictor = self.evictor
        for block, index in freed:
            if block in evictor:
                evictor.on_hit(block, now)
            else:
                self.seconds += self.cost(index)
        for _ in range(min(len(evictor), max(0, len(evictor) + len(freed) - room))):
            evictor.victim(now)
        for block, index in freed[-room:]:
            evictor.on_ref_zero(block, index, now)


class Ghost(Evictor):
    """LRU and AsymCache in several settings, each as a ghost; evicts like the cheapest of them."""

    def __init__(self, capacity: int, cost: RecomputeCost) -> None:
        """`capacity`: blocks of the store."""
        self.cost = cost
        self._share = -(-capacity // ROOM)
        self._room = max(1, capacity // self._share)
        self._period = max(1, capacity // OFTEN)
        self._active: LRU | AsymCache = LRU()
        self._chosen = 0
        self._free: dict[int, tuple[int, float]] = {}
        """Place and time of the blocks that may be evicted, in the order in which they were freed."""
        tuned: list[LRU | AsymCache] = [AsymCache(cost, Reuse(UNSEEN, p), adapt=False) for p, _ in SETTINGS]
        self._ghosts = [_Ghost(evictor, cost) for evictor in [LRU(), *tuned]]
        self._served = 0
        self._last: dict[int, float] = {}
        """When the blocks seen lately were used last, the oldest first."""
        self._reuse_s: deque[float] = deque(maxlen=HISTORY * ROOM)
        self._waiting: Freed = []
        self._freed_at = 0.0

    def __len__(self) -> int:
        return len(self._free)

    @property
    def setting(self) -> Reuse | None:
        """The setting in force; None for LRU."""
        return self._active.reuse if isinstance(self._active, AsymCache) else None

    def on_ref_zero(self, block: int, index: int, now: float) -> None:
        if now != self._freed_at or (self._waiting and index >= self._waiting[-1][1]):
            self._serve()
        self._freed_at = now
        self._free[block] = index, now
        self._active.on_ref_zero(block, index, now)
        self._served += 1
        if (block * SCATTER >> 32) % self._share == 0:
            self._waiting.append((block, index))

    def on_hit(self, block: int, now: float) -> None:
        del self._free[block]
        self._active.on_hit(block, now)

    def victim(self, now: float) -> int:
        if self._served >= self._period:
            self._serve()
            self._select(now)
        block = self._active.victim(now)
        del self._free[block]
        return block

    def _serve(self) -> None:
        """Let every ghost serve the sequence that was freed last."""
        now = self._freed_at
        for block, _ in self._waiting:
            if (last := self._last.pop(block, None)) is not None:
                self._reuse_s.append(now - last)
            self._last[block] = now
        while len(self._last) > HISTORY * self._room:
            del self._last[next(iter(self._last))]
        for ghost in self._ghosts:
            ghost.serve(self._waiting, self._room, now)
        self._waiting = []

    def _select(self, now: float) -> None:
        """Follow the cheapest ghost, forget half of what each has cost, set lifespans anew."""
        self._served = 0
        best = min(range(len(self._ghosts)), key=lambda place: self._ghosts[place].seconds)
        for ghost in self._ghosts:
            ghost.seconds /= 2
        if self._reuse_s:
            lifespans = dict(zip(QUANTILES, np.quantile(self._reuse_s, QUANTILES), strict=True))
            for evictor, (_, quantile) in zip(self._tuned(), SETTINGS, strict=True):
                evictor.use(replace(evictor.reuse, L=max(SHORTEST, float(lifespans[quantile]))))
        if best != self._chosen:
            self._follow(best)
        elif isinstance(self._active, AsymCache):
            self._active.use(self._tuned()[best - 1].reuse)

    def _tuned(self) -> list[AsymCache]:
        """The ghosts' evictors in order of `SETTINGS`, without LRU."""
        return [ghost.evictor for ghost in self._ghosts if isinstance(ghost.evictor, AsymCache)]

    def _follow(self, best: int) -> None:
        """Evict like a ghost from now on."""
        self._chosen = best
        self._active = AsymCache(self.cost, self._tuned()[best - 1].reuse, adapt=False) if best else LRU()
        for block, (index, freed) in self._free.items():
            self._active.on_ref_zero(block, index, freed)
