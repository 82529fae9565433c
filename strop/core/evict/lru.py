"""Least recently used: the block that was freed first goes first.

Sequences free their last block first (as vLLM does), so what is left of one is always a prefix.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from strop.core.evict.base import Evictor


class LRU(Evictor):
    """The blocks in the order in which they were freed; whole runs at once for the store."""

    def __init__(self) -> None:
        self.blocks: OrderedDict[int, None] = OrderedDict()

    def on_ref_zero(self, block: int, index: int, now: float) -> None:
        self.blocks[block] = None

    def on_hit(self, block: int, now: float) -> None:
        del self.blocks[block]

    def victim(self, now: float) -> int:
        if not self.blocks:
            raise IndexError("no block may be evicted")
        return self.blocks.popitem(last=False)[0]

    def __len__(self) -> int:
        return len(self.blocks)

    def __contains__(self, block: int) -> bool:
        return block in self.blocks

    def put(self, blocks: Sequence[int], start: int, now: float) -> None:
        """`on_ref_zero` of a sequence's blocks from place `start` on, the last one first."""
        order = self.blocks
        for block in reversed(blocks):
            order[block] = None

    def take(self, blocks: Iterable[int], now: float) -> None:
        """`on_hit` of each."""
        for block in blocks:
            del self.blocks[block]

    def evict(self, count: int, now: float) -> list[int]:
        """So many victims."""
        pop = self.blocks.popitem
        return [pop(False)[0] for _ in range(count)]
