"""Evictors that look at every block: what they know in columns, and the lowest score of all goes."""

from abc import abstractmethod

import numpy as np

from strop.core.evict.base import Evictor

FIRST = 1024
"""Rows at the beginning; they double."""


class Scan(Evictor):
    """Blocks as rows of arrays `[n]`; of equal scores the furthest in its sequence goes. O(n) a victim."""

    def __init__(self) -> None:
        self._row: dict[int, int] = {}
        self._blocks: list[int] = []
        self._columns = np.empty((3, FIRST))

    @abstractmethod
    def score(self, index: np.ndarray, freed: np.ndarray, extra: np.ndarray, now: float) -> np.ndarray:
        """What each block is worth `[n]`, by its place, the second it was freed and what `note` said."""

    def note(self, block: int, index: int, now: float) -> float:
        """What to remember of a block beside its place and time."""
        return 0.0

    def on_ref_zero(self, block: int, index: int, now: float) -> None:
        row = len(self._blocks)
        if row == self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.empty_like(self._columns)], axis=1)
        self._row[block] = row
        self._blocks.append(block)
        self._columns[:, row] = index, now, self.note(block, index, now)

    def on_hit(self, block: int, now: float) -> None:
        row, last = self._row.pop(block), self._blocks.pop()
        if last != block:
            self._blocks[row], self._row[last] = last, row
            self._columns[:, row] = self._columns[:, len(self._blocks)]

    def victim(self, now: float) -> int:
        if not self._blocks:
            raise IndexError("no block may be evicted")
        index, freed, extra = self._columns[:, : len(self._blocks)]
        scores = self.score(index, freed, extra, now)
        lowest = np.flatnonzero(scores == scores.min())
        block = self._blocks[lowest[index[lowest].argmax()]]
        self.on_hit(block, now)
        return block

    def __len__(self) -> int:
        return len(self._blocks)
