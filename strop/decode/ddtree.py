"""DDTree (arXiv 2604.12989): the most probable prefixes under the drafter, a fixed number of them.

Over a TreeFlash drafter (arXiv 2606.03819) this is TreeFlash's tree. The root is not counted.
"""

from dataclasses import dataclass

from strop.decode.base import Drafted
from strop.decode.builder import Grown, TreeBuilder
from strop.decode.stop import FixedBudget


@dataclass(frozen=True, kw_only=True)
class DDTree(Drafted):
    """Verify a tree of fixed size."""

    budget: int = 16
    """Nodes drafted in every round, B."""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1, got {self.budget}")

    @property
    def least_rollback(self) -> int:
        return self.budget

    def builder(self) -> TreeBuilder:
        return Grown(FixedBudget(self.budget))
