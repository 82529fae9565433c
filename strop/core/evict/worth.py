"""Which cached block is worth least: the chance that it is used again, times what computing it again costs.

AsymCache (arXiv 2606.02964, 4.3 and 4.4). A block late in a sequence attends to all before it, so losing it
costs more. Only exponentials keep the order of two blocks as time goes by, so the chance of reuse is the
smaller of two, and in log space each of them gives a block a key that never changes.

Differs: the cost counts a block's attention once, b * index with b the seconds of one block over another,
where the paper's square gives twice that.
"""

import math
from dataclasses import dataclass

import numpy as np

from strop.core.errors import StropError


@dataclass(frozen=True)
class Reuse:
    """The chance f(tau) that a block unused for tau seconds is used again."""

    L: float
    """Lifespan in seconds, where f turns from flat to steep: a high percentile of reuse times."""
    p: float = 0.9
    """Chance of reuse at L."""
    R: float = 40.0
    """How much steeper log f falls behind L."""

    def __post_init__(self) -> None:
        if not (0 < self.L < math.inf and 0 < self.p < 1 and 1 <= self.R < math.inf):
            raise StropError(
                f"{self} is no chance of reuse: L must be above 0, p between 0 and 1, R at least 1"
            )

    @property
    def alpha(self) -> float:
        """Seconds in which the flat branch falls by e."""
        return -self.L / math.log(self.p)

    @property
    def beta(self) -> float:
        """Seconds in which the steep branch falls by e."""
        return self.alpha / self.R

    @property
    def tau0(self) -> float:
        """Seconds at which the steep branch is 1."""
        return self.L * (1 - 1 / self.R)

    def log_f(self, tau: np.ndarray | float, log_lambda: float = 0.0) -> np.ndarray:
        """ln f of seconds since the last use; `log_lambda` lifts the steep branch."""
        tau = np.asarray(tau, dtype=np.float64)
        return np.minimum(-tau / self.alpha, log_lambda + (self.tau0 - tau) / self.beta)

    def f(self, tau: np.ndarray | float, log_lambda: float = 0.0) -> np.ndarray:
        """f of seconds since the last use; underflows to 0 for old blocks."""
        return np.exp(self.log_f(tau, log_lambda))

    def log_lambda(self, lifespan: float) -> float:
        """What lifts the steep branch so that the branches cross at `lifespan` seconds instead of L."""
        return (lifespan - self.tau0) / self.beta - lifespan / self.alpha


@dataclass(frozen=True)
class RecomputeCost:
    """Seconds a + b * index that computing a block again takes, by its place in the sequence."""

    a: float
    b: float

    def __post_init__(self) -> None:
        if not (0 < self.a < math.inf and 0 <= self.b < math.inf):
            raise StropError(f"{self} is no cost: a must be positive and b not negative")

    @classmethod
    def of(cls, token_s: float, context_s: float, block: int) -> "RecomputeCost":
        """From seconds a token, seconds a token and token of context before it, and tokens of a block."""
        return cls(token_s * block + context_s * block**2 / 2, context_s * block**2)

    def __call__(self, index: int) -> float:
        """Seconds of the block at a place."""
        return self.a + self.b * index

    def run(self, start: int, stop: int) -> float:
        """Seconds of the blocks from `start` up to `stop`."""
        return (stop - start) * (self.a + self.b * (start + stop - 1) / 2)
