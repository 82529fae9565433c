"""The KV blocks of one instance: in use, cached, pinned; and which instances hold a block.

A block is named by its chained hash, which fixes everything before it. Whoever holds a block therefore holds
all blocks before it in the sequence, so that blocks in use are a prefix of any sequence, and a cached block
behind a hole is still valid (AsymCache, arXiv 2606.02964, 3).
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from strop.core.errors import StropError
from strop.core.evict.base import Evictor
from strop.core.evict.lru import LRU


class Run(NamedTuple):
    """Blocks `start` up to `stop` of a sequence, all resident or all missing."""

    start: int
    stop: int
    resident: bool


class PrefixIndex:
    """Which of E stores hold a block: its hash to a bit mask of them."""

    def __init__(self, stores: int) -> None:
        self.stores = stores
        self._masks: dict[int, int] = {}

    def add(self, blocks: Sequence[int], bit: int) -> None:
        """A store holds these from now on."""
        masks, mask = self._masks, 1 << bit
        get = masks.get
        for block in blocks:
            masks[block] = get(block, 0) | mask

    def remove(self, blocks: Sequence[int], bit: int) -> None:
        """A store that held these no longer does."""
        masks, mask = self._masks, 1 << bit
        for block in blocks:
            if left := masks[block] ^ mask:
                masks[block] = left
            else:
                del masks[block]

    def hits(self, blocks: Sequence[int]) -> np.ndarray:
        """How many blocks of a sequence each store holds without a hole, `[E]`, by one walk."""
        hits = [0] * self.stores
        get, alive, depth = self._masks.get, (1 << self.stores) - 1, 0
        for depth, block in enumerate(blocks):
            mask = alive & get(block, 0)
            if mask != alive:
                if depth:
                    _set(hits, alive ^ mask, depth)
                if not mask:
                    break
                alive = mask
        else:
            _set(hits, alive, len(blocks))
        return np.array(hits, dtype=np.int64)


def _set(hits: list[int], mask: int, depth: int) -> None:
    """Write `depth` at every place whose bit is set."""
    while mask:
        low = mask & -mask
        hits[low.bit_length() - 1] = depth
        mask ^= low


class _OneByOne:
    """Any evictor as the store wants it: told of many blocks at once. `LRU` is so by itself."""

    def __init__(self, evictor: Evictor) -> None:
        self.evictor = evictor
        self.blocks: dict[int, None] = {}

    def put(self, blocks: Sequence[int], start: int, now: float) -> None:
        on_ref_zero = self.evictor.on_ref_zero
        for index in range(len(blocks) - 1, -1, -1):
            on_ref_zero(blocks[index], start + index, now)
        self.blocks.update(dict.fromkeys(blocks))

    def take(self, blocks: Sequence[int], now: float) -> None:
        on_hit = self.evictor.on_hit
        for block in blocks:
            on_hit(block, now)
            del self.blocks[block]

    def evict(self, count: int, now: float) -> list[int]:
        victims = [self.evictor.victim(now) for _ in range(count)]
        for block in victims:
            del self.blocks[block]
        return victims


class KVStore:
    """Blocks of one instance, at most `capacity`: in use, or cached until the evictor gives them up.

    A block counts as resident as soon as it is acquired. A sequence that is acquired must be released with
    the same blocks; no block stands twice in one. Blocks without a hash are only counted.
    """

    def __init__(
        self, capacity_blocks: int, evictor: Evictor, index: PrefixIndex | None = None, bit: int = 0
    ) -> None:
        if capacity_blocks < 1:
            raise StropError(f"a store of {capacity_blocks} blocks holds nothing: give it at least 1")
        self.capacity = capacity_blocks
        self.evictor = evictor
        self.anonymous = 0
        """Blocks in use that have no hash."""
        self._index, self._bit = index, bit
        self._held: set[int] = set()
        self._more: dict[int, int] = {}
        """Holders beyond the first, of blocks that have more than one."""
        self._idle: LRU | _OneByOne = evictor if isinstance(evictor, LRU) else _OneByOne(evictor)
        self.pinned: dict[int, tuple[float, Sequence[int]]] = {}
        """By session, oldest first: when the pin ends, and what it holds."""
        self._due = np.inf
        """No pin ends before."""

    @property
    def used(self) -> int:
        """Blocks in use or pinned."""
        return len(self._held) + self.anonymous

    @property
    def free(self) -> int:
        """Blocks that are neither; cached ones count as free."""
        return self.capacity - len(self._held) - self.anonymous

    @property
    def cached(self) -> int:
        """Blocks that nobody uses and that are still there."""
        return len(self._idle.blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._held or block in self._idle.blocks

    def hits(self, blocks: Sequence[int]) -> int:
        """How many blocks of a sequence are resident before the first that is not."""
        held, idle = self._held, self._idle.blocks
        for depth, block in enumerate(blocks):
            if block not in held and block not in idle:
                return depth
        return len(blocks)

    def match(self, blocks: Sequence[int]) -> list[Run]:
        """The sequence as runs that alternate between resident and missing."""
        runs, start = [], 0
        last = bool(blocks) and blocks[0] in self
        for place, block in enumerate(blocks):
            if (block in self) != last:
                runs.append(Run(start, place, last))
                start, last = place, not last
        if blocks:
            runs.append(Run(start, len(blocks), last))
        return runs

    def acquire(self, blocks: Sequence[int], anonymous: int, now: float) -> bool:
        """Hold a sequence's blocks and so many without a hash, evicting what is in the way.

        Where they do not fit, pins are given up, the newest first; where that is not enough either, the
        answer is False and nothing has changed.
        """
        if self._due <= now:
            self._expire(now)
        shared = self._shared(blocks)
        if self.used + len(blocks) - shared + anonymous > self.capacity:
            if not self._unpin_for(blocks, anonymous, now):
                return False
            shared = self._shared(blocks)
        rest = blocks[shared:]
        cached, new = self._idle.blocks, rest
        if not cached.keys().isdisjoint(rest):
            new = [block for block in rest if block not in cached]
            self._idle.take([block for block in rest if block in cached], now)
        self._count(blocks[:shared])
        self._held.update(rest)
        self.anonymous += anonymous
        over = self.used + len(cached) - self.capacity
        victims = self._idle.evict(over, now) if over > 0 else ()
        if self._index is not None:
            self._index.remove(victims, self._bit)
            self._index.add(new, self._bit)
        return True

    def release(self, blocks: Sequence[int], anonymous: int, now: float) -> None:
        """Let go of what was acquired: blocks that nobody else holds are cached, the last one freed first."""
        if self._due <= now:
            self._expire(now)
        self.anonymous -= anonymous
        self._let_go(blocks, now)

    def pin(self, session: int, blocks: Sequence[int], until: float, now: float) -> int:
        """Hold a sequence up to its first hole for a session; how many blocks that is.

        An earlier pin of the session ends. The blocks are no victims before `until`, unless a sequence that
        is acquired finds no other room.
        """
        if self._due <= now:
            self._expire(now)
        blocks = blocks[: self.hits(blocks)]
        shared = self._shared(blocks)
        self._count(blocks[:shared])
        self._idle.take(blocks[shared:], now)
        self._held.update(blocks[shared:])
        if session in self.pinned:
            self._end(session, now)
        if blocks:
            self.pinned[session] = (until, blocks)
            self._due = min(self._due, until)
        return len(blocks)

    def unpin(self, session: int, now: float) -> None:
        """End a session's pin, where it has one."""
        if self._due <= now:
            self._expire(now)
        if session in self.pinned:
            self._end(session, now)

    def check(self) -> None:
        """Raise AssertionError where a count is wrong."""
        assert self.anonymous >= 0
        assert self.used + self.cached <= self.capacity
        assert len(self.evictor) == self.cached
        assert self._held.isdisjoint(self._idle.blocks)
        assert self._more.keys() <= self._held and min(self._more.values(), default=1) > 0
        assert all(self._held.issuperset(blocks) for _, blocks in self.pinned.values())

    def _shared(self, blocks: Sequence[int]) -> int:
        """How many blocks of a sequence are in use: a prefix of it."""
        held = self._held
        for depth, block in enumerate(blocks):
            if block not in held:
                return depth
        return len(blocks)

    def _count(self, blocks: Sequence[int]) -> None:
        """One more holder of blocks in use."""
        more = self._more
        for block in blocks:
            more[block] = more.get(block, 0) + 1

    def _let_go(self, blocks: Sequence[int], now: float) -> None:
        """One holder less of a sequence in use; what is left without any is cached."""
        more = self._more
        for place, block in enumerate(blocks):
            if block not in more:
                alone = blocks[place:]
                self._held.difference_update(alone)
                self._idle.put(alone, place, now)
                return
            if more[block] == 1:
                del more[block]
            else:
                more[block] -= 1

    def _end(self, session: int, now: float) -> None:
        """End one pin."""
        self._let_go(self.pinned.pop(session)[1], now)

    def _lapse(self, session: int, now: float) -> None:
        """End a pin whose session is still away: what it called runs on, which evictors may heed."""
        self.evictor.on_tool_call(self.pinned[session][1], now)
        self._end(session, now)

    def _expire(self, now: float) -> None:
        """End the pins whose time is over, in order."""
        for until, session in sorted((until, session) for session, (until, _) in self.pinned.items()):
            if until <= now:
                self._lapse(session, until)
        self._due = min((until for until, _ in self.pinned.values()), default=np.inf)

    def _unpin_for(self, blocks: Sequence[int], anonymous: int, now: float) -> bool:
        """End pins, the newest first, until a sequence fits; False, and none ends, where it never will."""
        kept = set(blocks)
        pinned = Counter(block for _, held in self.pinned.values() for block in held)
        freed = sum(
            self._more.get(block, 0) + 1 == pins for block, pins in pinned.items() if block not in kept
        )
        need = len(blocks) - self._shared(blocks) + anonymous
        if self.used - freed + need > self.capacity:
            return False
        while self.used + len(blocks) - self._shared(blocks) + anonymous > self.capacity:
            self._lapse(next(reversed(self.pinned)), now)
        return True
