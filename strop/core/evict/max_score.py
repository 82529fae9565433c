"""Max-Score: the block least likely to be used again, whatever it costs (a baseline of arXiv 2606.02964).

The chance of reuse is AsymCache's f. It falls with time, so the victim is always the oldest block, as with
LRU; what differs is that every block is looked at.
"""

import numpy as np

from strop.core.evict.scan import Scan
from strop.core.evict.worth import Reuse


class MaxScore(Scan):
    """argmin f, in log space, where old blocks do not all become 0."""

    def __init__(self, reuse: Reuse) -> None:
        super().__init__()
        self.reuse = reuse

    def score(self, index: np.ndarray, freed: np.ndarray, extra: np.ndarray, now: float) -> np.ndarray:
        return self.reuse.log_f(now - freed)
