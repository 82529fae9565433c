"""Pages of keys and values that requests share: counted, named by what they hold, checked before reuse.

A request's text is cut into blocks of `page` tokens. A block has a name, the chained hash of all tokens up to
its end, and a physical page for as long as it is held or cached. Two lookups share the store: an ordinary
request's blocks, each tested so that misses become runs to compute (AsymCache, arXiv 2606.02964, 3), and
documents, named alone and without position (LazyAttention, arXiv 2606.04302). A page is served once it is
sealed: written, summed, and, where there is a codec, packed.

With a codec the store has fewer open pages, of the model's own 16 bits, than pages: blocks being written, the
first of each chain (attention sinks) and short last ones lie there; all others are records of a codec's tile.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel

from strop.core.blocks import KVStore, Run
from strop.core.cache import require, tensor_bytes
from strop.core.errors import StropError
from strop.core.evict.base import Evictor
from strop.core.evict.lru import LRU
from strop.kv.base import KVShape
from strop.kv.page_hash import Chain, fingerprint
from strop.kv.page_pool import PagePool
from strop.kv.tile_store import TileCodec

PAGES = (8, 16, 32, 64, 128, 256)
"""Sizes of a page in tokens."""


class Lease(NamedTuple):
    """Pages that a request holds."""

    named: list[int]
    """One for each block, in order."""
    anonymous: list[int]
    """Those without a name."""


class Seal(NamedTuple):
    """What is known of a page that is written."""

    valid: int
    """Slots that count."""
    checksum: int


class PagedStore:
    """Pages of one model, at most `pages`; every layer has the same."""

    def __init__(
        self,
        model: PreTrainedModel,
        pages: int,
        page: int = 16,
        evictor: Evictor | None = None,
        codec: TileCodec | None = None,
        open_pages: int | None = None,
    ) -> None:
        """Pages of `page` tokens for `model`, in its dtype and on its device; LRU without an `evictor`.

        With a `codec`, whose tile must be a page, `open_pages` of them may be in 16 bits at a time, a quarter
        where nothing is said. Raises StropError when the model does not keep keys and values of all tokens in
        all layers, and for sizes that do not fit.
        """
        config = model.config.get_text_config(decoder=True)
        open_pages = -(-pages // 4) if open_pages is None else open_pages
        _require_sizes(page, codec, open_pages, pages)
        shape = KVShape.of(config, model.dtype.itemsize)
        if shape.layers != config.num_hidden_layers or getattr(config, "kv_lora_rank", None) is not None:
            raise StropError(
                "some layers of this model keep a sliding window, a latent or a state instead of keys and "
                "values of all tokens, which pages cannot hold: use a model with full attention throughout"
            )
        self.page, self.pages = page, pages
        self.context: int = getattr(config, "max_position_embeddings", 2**31)
        """Positions that the model was made for."""
        self.chain = Chain(fingerprint(model), page)
        evictor = LRU() if evictor is None else evictor
        self.residency = KVStore(pages, evictor, index=self)  # type: ignore[arg-type]
        self.pool = PagePool(shape, model.dtype, model.device, pages, page, codec, open_pages)
        self.open_pages = open_pages if codec else pages
        """Of them at most so many are in 16 bits at a time."""
        self._page: dict[int, int] = {}
        """By block."""
        self._free = list(range(pages))
        self._seals: dict[int, Seal] = {}
        """By page."""
        self._holders: Counter[int] = Counter()
        """How many requests hold a block."""
        self._now = 0.0
        """When something was last acquired or released."""

    # Names.

    def blocks(self, tokens: Sequence[int], parent: int = 0) -> list[int]:
        """A name for each block of a text, see `Chain.blocks`."""
        return self.chain.blocks(tokens, parent)

    def seed(self, documents: Sequence[Sequence[int]]) -> int:
        """The parent of a query's first block behind documents, each given by its blocks."""
        return self.chain.seed(documents)

    def require_model(self, model: PreTrainedModel) -> None:
        """Raise StropError unless these pages are the model's."""
        if fingerprint(model) != self.chain.key:
            raise StropError(
                "these pages hold keys and values of another model (its settings or weights differ): "
                "make a PagedStore for each model"
            )

    # Lookups.

    def match(self, blocks: Sequence[int]) -> list[Run]:
        """The blocks of a chain as runs that alternate between served and to be computed.

        Checks the bytes of each page: one that is not as it was written is to be computed again.
        """
        for page in self._damaged([self._page[block] for block in blocks if self.sealed(block)]):
            self._void(page)
        return self.runs(blocks)

    def runs(self, blocks: Sequence[int]) -> list[Run]:
        """`match` without reading the pages."""
        runs, start = [], 0
        for resident, run in groupby(map(self.sealed, blocks)):
            stop = start + len(list(run))
            runs.append(Run(start, stop, resident))
            start = stop
        return runs

    def sealed(self, block: int) -> bool:
        """Whether a block is written, and may be read but not written again."""
        return block in self._page and self._page[block] in self._seals

    # Holding.

    def acquire(self, blocks: Sequence[int], anonymous: int, now: float) -> Lease | None:
        """Hold the blocks of one chain, from its beginning, and pages without a name; evicts others.

        None, and nothing changes, where they do not fit. Documents and the query behind them are chains of
        their own. Blocks that are not sealed must be computed.
        """
        self._now = now
        if not self.residency.acquire(blocks, anonymous, now):
            return None
        self._holders.update(blocks)
        return Lease([self._page[block] for block in blocks], [self._free.pop() for _ in range(anonymous)])

    def release(self, blocks: Sequence[int], anonymous: Sequence[int], now: float) -> None:
        """Let go of the blocks of a chain and of pages without a name, as they were acquired or adopted."""
        self._now = now
        self.residency.release(blocks, len(anonymous), now)
        self._holders.subtract(blocks)
        for block in blocks:
            if not self._holders[block]:
                del self._holders[block]
                if not self.sealed(block):
                    self.pool.close(self._page[block])
        for page in anonymous:
            self._void(page)
        self._free += anonymous

    def adopt(self, page: int, block: int, now: float) -> int | None:
        """Give a page without a name the next name of its chain, now that its block is full.

        Returns the page that stands for the block from now on: another, if one is sealed already. None where
        another request is about to write the block: the page stays without a name, and so must what follows.
        """
        if block in self._page and not self.sealed(block):
            if block in self._holders:
                return None
            page, self._page[block] = self._page[block], page
        if block in self._page:
            self._void(page)
        self._free.append(page)
        self.residency.release([], 1, now)
        self.residency.acquire([block], 0, now)
        self._holders[block] += 1
        return self._page[block]

    # Writing.

    def open(self, pages: np.ndarray) -> np.ndarray:
        """Rows of the pool's keys and values `[n]` where pages `[n]` are written.

        Where a codec's 16-bit pages run out, cached blocks are evicted until those that they kept suffice.
        Raises StropError when they do not, ValueError for a sealed page.
        """
        if any(page in self._seals for page in pages.tolist()):
            raise ValueError("a sealed page is shared and never written again")
        while self.pool.closed(pages) > self.pool.open_rows and self.residency.cached:
            self._evict_one()
        self.pool.open(pages)
        return self.pool.row[pages]

    def closed(self, page: int) -> bool:
        """Whether a page must be opened before it is written."""
        return bool(self.pool.row[page] < 0)

    def writable(self) -> int:
        """How many more pages `open` could open, had all cached blocks to give way."""
        if self.pool.codec is None:
            return self.pages
        cached = [page for block, page in self._page.items() if block not in self._holders]
        return self.pool.open_rows + sum(not self.closed(page) for page in cached)

    def seal(self, blocks: Sequence[int], start: int, valid: Sequence[int]) -> None:
        """Blocks of a chain from place `start` on are written, so many slots of each: serve them from now on.

        Only the last block of a document may be short. Those that are sealed already stay as they are.
        """
        fresh = {
            self._page[block]: (place, count)
            for place, (block, count) in enumerate(zip(blocks, valid, strict=True), start)
            if not self.sealed(block)
        }
        self.pool.pack([page for page, (place, count) in fresh.items() if place and count == self.page])
        counts = [count for _, count in fresh.values()]
        sums = self.pool.sums(list(fresh), counts)
        self._seals |= dict(zip(fresh, map(Seal, counts, sums), strict=True))

    def unseal(self, block: int) -> np.ndarray:
        """The row `[1]` of a block that its only holder writes again, before it seals it."""
        if self._holders[block] != 1 or not self.sealed(block) or self.pool.codec is not None:
            raise ValueError("a block is written again in 16 bits alone, and by its only holder")
        page = self._page[block]
        self._void(page)
        return self.pool.row[[page]]

    # What the residency tells of named blocks.

    def add(self, blocks: Sequence[int], bit: int) -> None:
        """Blocks became resident: they get pages."""
        for block in blocks:
            self._page[block] = self._free.pop()

    def remove(self, blocks: Sequence[int], bit: int) -> None:
        """Blocks were evicted: their pages are free."""
        for block in blocks:
            page = self._page.pop(block)
            self._void(page)
            self._free.append(page)

    def check(self) -> None:
        """Raise ValueError, or AssertionError where a count is wrong, unless all invariants hold.

        Reads every sealed page.
        """
        self.residency.check()
        self.pool.check()
        named, free = set(self._page.values()), set(self._free)
        require(len(named) == len(self._page), "a page under two names")
        require(len(free) == len(self._free) and not named & free, "a page that is free and in use")
        require(len(named) + len(free) + self.residency.anonymous == self.pages, "pages that were lost")
        require(self._seals.keys() <= named, "a seal on a page without a name")
        require(self._holders.keys() <= self._page.keys(), "a held block without a page")
        require(not self._damaged(list(self._seals)), "a sealed page that has changed")

    def bytes(self) -> int:
        """Bytes of all tensors."""
        return tensor_bytes(self)

    def _evict_one(self) -> None:
        """Have the evictor give up one cached block: ask for a page more than is free without that."""
        count = self.residency.free - self.residency.cached + 1
        self.residency.acquire([], count, self._now)
        self.residency.release([], count, self._now)

    def _damaged(self, pages: Sequence[int]) -> list[int]:
        """Of sealed pages those whose bytes are not as they were written."""
        seals = [self._seals[page] for page in pages]
        sums = self.pool.sums(pages, [seal.valid for seal in seals])
        return [page for page, seal, now in zip(pages, seals, sums, strict=True) if now != seal.checksum]

    def _void(self, page: int) -> None:
        """A page holds nothing that may be served."""
        self._seals.pop(page, None)
        self.pool.close(page)


def _require_sizes(page: int, codec: TileCodec | None, open_pages: int, pages: int) -> None:
    if page not in PAGES:
        raise StropError(f"a page of {page} tokens does not fit: choose one of {', '.join(map(str, PAGES))}")
    if codec is not None and codec.group != page:
        raise StropError(
            f"the codec packs {codec.group} tokens a tile and a page holds {page}: give both the same size"
        )
    if codec is not None and not 1 <= open_pages <= pages:
        raise StropError(
            f"with a codec some pages are still in 16 bits: give open_pages from 1 to {pages}, not "
            f"{open_pages}"
        )
