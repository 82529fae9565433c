"""CaDDTree (arXiv 2606.01813): DDTree that stops where another node costs more time than it brings tokens.

What passes cost is measured on the machine, once for a model, a drafter and a cache, and corrected while
rounds run. No budget needs to be set: a round verifies as many nodes as pay, or none.
"""

from dataclasses import dataclass

from strop.decode.base import Drafted
from strop.decode.calibrate import CostAware


@dataclass(frozen=True, kw_only=True)
class CaDDTree(Drafted):
    """Verify a tree of the size that makes tokens a second highest."""

    price: str = "round"
    """"round" maximises each round's tokens a second, "global" those of all rounds together."""

    def __post_init__(self) -> None:
        if self.price not in ("round", "global"):
            raise ValueError(f'price must be "round" or "global", got {self.price!r}')

    @property
    def least_rollback(self) -> int:
        return 1

    def builder(self) -> CostAware:
        return CostAware(self.price)
