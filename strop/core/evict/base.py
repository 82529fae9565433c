"""The contract of evictors."""

from abc import ABC, abstractmethod
from collections.abc import Sequence


class Evictor(ABC):
    """Which cached block goes when room is needed; knows only blocks that nobody uses.

    Blocks are named by their chained hash; `index` is the place of a block in its sequence, which the hash
    fixes.
    """

    @abstractmethod
    def on_ref_zero(self, block: int, index: int, now: float) -> None:
        """Nobody uses the block any more: it may be evicted from now on."""

    @abstractmethod
    def on_hit(self, block: int, now: float) -> None:
        """Somebody uses the block again: it may not be evicted."""

    @abstractmethod
    def victim(self, now: float) -> int:
        """Remove and return the block to evict. Raises IndexError where there is none."""

    @abstractmethod
    def __len__(self) -> int:
        """Blocks that may be evicted."""

    def on_tool_call(self, blocks: Sequence[int], now: float) -> None:  # noqa: B027 - most do not care
        """The answer behind these blocks ended in a call of a tool. Comes before they are freed."""

    def tune(self, reuse_s: Sequence[float], now: float) -> None:  # noqa: B027 - most have nothing to set
        """Hear seconds between uses of blocks, as observed lately."""
