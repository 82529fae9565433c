"""vLLM's queue of free blocks in the order of an evictor.

Stands in for `FreeKVCacheBlockQueue` of vLLM 0.32 and offers what `BlockPool` calls. Blocks without a hash
go first, the one freed last at the head, as in vLLM; so does a second copy of a block that waits already.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from strop.core.evict.base import Evictor

Block = Any
"""vLLM's KVCacheBlock."""


class EvictorQueue:
    """Free blocks: blank ones, and cached ones that the evictor knows by their hash."""

    def __init__(
        self,
        blocks: Iterable[Block],
        evictor: Evictor,
        block_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._evictor, self._block_size, self._clock = evictor, block_size, clock
        self._blank: dict[int, Block] = {}
        """By id; the last one leaves first."""
        self._cached: dict[int, Block] = {}
        """By hash."""
        self._hashes: dict[int, int] = {}
        """Of cached blocks, by id."""
        self.prepend_n(list(blocks))

    @property
    def num_free_blocks(self) -> int:
        return len(self._blank) + len(self._cached)

    def popleft_n(self, n: int) -> list[Block]:
        """So many blocks to be written anew."""
        now = self._clock()
        return [self._blank.popitem()[1] if self._blank else self._victim(now) for _ in range(n)]

    def remove(self, block: Block) -> None:
        """Somebody uses a block again."""
        name = self._hashes.pop(block.block_id, None)
        if name is None:
            del self._blank[block.block_id]
        else:
            del self._cached[name]
            self._evictor.on_hit(name, self._clock())

    def prepend_n(self, blocks: list[Block]) -> None:
        """Blocks that hold nothing."""
        self._blank.update((block.block_id, block) for block in reversed(blocks))

    def append_n(self, blocks: list[Block]) -> None:
        """Cached blocks of one sequence, the last one first."""
        now = self._clock()
        for block in blocks:
            name = int.from_bytes(block.block_hash[:8], "big") >> 1
            if name in self._cached:
                self._blank[block.block_id] = block
                continue
            self._cached[name], self._hashes[block.block_id] = block, name
            self._evictor.on_ref_zero(name, block.block_hash_num_tokens // self._block_size - 1, now)

    def _victim(self, now: float) -> Block:
        block = self._cached.pop(self._evictor.victim(now))
        del self._hashes[block.block_id]
        return block
