"""How many prompt tokens an iteration computes beside running decodes: a fixed chunk, or one that shrinks.

A long chunk makes every request that decodes wait for it; a short one prefills slowly. AsymCache (arXiv
2606.02964, 5.1) shrinks the chunk where many decode, down to a floor. The paper gives the rule without
numbers: they are ours.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from strop.core.errors import StropError
from strop.core.method import Method


class BatchPolicy(ABC):
    """How many prompt tokens are computed beside running decodes in one iteration."""

    @abstractmethod
    def chunk(self, decodes: int) -> int:
        """Most prompt tokens of the next iteration, given how many requests decode."""


@dataclass(frozen=True)
class Fixed(BatchPolicy, Method):
    """The same chunk, however many decode."""

    base: int = 2048
    """Tokens."""

    def __post_init__(self) -> None:
        if self.base < 1:
            raise StropError(f"a chunk of {self.base} tokens prefills nothing: give it at least 1")

    def chunk(self, decodes: int) -> int:
        return self.base


@dataclass(frozen=True)
class Shrinking(BatchPolicy, Method):
    """base * threshold / decodes tokens, from `floor` to `base`."""

    base: int = 2048
    """Tokens where few decode."""
    threshold: int = 16
    """Requests that decode from which on the chunk shrinks."""
    floor: int = 256
    """Least tokens."""

    def __post_init__(self) -> None:
        if not (1 <= self.floor <= self.base and self.threshold >= 1):
            raise StropError(f"{self} shrinks to nothing: floor must be from 1 to base, threshold at least 1")

    def chunk(self, decodes: int) -> int:
        return max(self.floor, min(self.base, self.base * self.threshold // max(decodes, 1)))


CHUNKS: dict[str, type[Fixed] | type[Shrinking]] = {"fixed": Fixed, "shrinking": Shrinking}
