"""Pensieve (arXiv 2312.05516) as arXiv 2606.02964 compares with it: cost of recomputing over seconds unused.

Left out: the second tier in host memory to which Pensieve moves what it evicts. Every block is looked at.
"""

import numpy as np

from strop.core.evict.scan import Scan
from strop.core.evict.worth import RecomputeCost


class Pensieve(Scan):
    """argmin (a + b * index) / tau."""

    def __init__(self, cost: RecomputeCost) -> None:
        super().__init__()
        self.cost = cost

    def score(self, index: np.ndarray, freed: np.ndarray, extra: np.ndarray, now: float) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return (self.cost.a + self.cost.b * index) / (now - freed)
