"""Belady's rule weighted by cost: farthest next use, over the cost of recomputing. What an oracle could do.

It knows when every block is wanted next. With equal costs and sizes that is optimal for blocks (Belady,
1966); weighted it is a heuristic, near the optimum but no bound that is proved.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from strop.core.evict.scan import Scan
from strop.core.evict.worth import RecomputeCost


class Belady(Scan):
    """argmin cost / seconds until the next use; blocks that never come again go first."""

    def __init__(self, cost: RecomputeCost, future: Iterable[tuple[float, Sequence[int]]]) -> None:
        """`future`: the time and the blocks of every request, in order of time."""
        super().__init__()
        self.cost = cost
        self._uses: dict[int, list[float]] = defaultdict(list)
        for time, blocks in future:
            for block in blocks:
                self._uses[block].append(time)
        self._seen: dict[int, int] = defaultdict(int)

    def note(self, block: int, index: int, now: float) -> float:
        """When the block is used next: behind the uses that were seen, and not before now."""
        uses = self._uses[block]
        self._seen[block] = place = max(self._seen[block] + 1, bisect_left(uses, now))
        return uses[place] if place < len(uses) else np.inf

    def score(self, index: np.ndarray, freed: np.ndarray, extra: np.ndarray, now: float) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return (self.cost.a + self.cost.b * index) / np.maximum(extra - now, 0)
