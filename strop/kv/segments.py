"""Sessions of many turns over pages that may lose middle blocks: what is left is used, holes are computed.

A turn's tokens are cut into blocks of a chain, and every block is looked up, not only those before the first
that is missing, so an evictor is free to give up the blocks that are cheapest to compute again, which are the
early ones (AsymCache, arXiv 2606.02964, 3 and 4.3).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from strop.core.chunks import BatchPolicy
from strop.core.errors import StropError
from strop.core.evict import ONLINE, Surroundings
from strop.core.evict.worth import RecomputeCost, Reuse
from strop.core.sampling import KeyedSampler
from strop.kv.base import KVShape
from strop.kv.engine import Engine
from strop.kv.pages import PagedStore
from strop.kv.requests import Answer, Request
from strop.kv.texts import Text, Texts
from strop.kv.tile_store import TileCodec

LIFESPAN_S = 60.0
"""Seconds within which a turn is likely followed by the next one, where nothing else is said."""
Turn = Text | Sequence[dict[str, str]]
"""A conversation so far: text, token ids, or chat messages."""


class SegmentCache:
    """Keys and values of sessions of one model, in pages."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        pages: int | None = None,
        page: int = 16,
        evictor: str = "asymcache",
        cost: RecomputeCost | None = None,
        reuse: Reuse | None = None,
        codec: TileCodec | None = None,
        open_pages: int | None = None,
        chunks: BatchPolicy | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """At most `pages` of `page` tokens, for a `strop.Model` or a transformers model and its tokenizer.

        None holds four contexts of the model, 32,768 tokens at most.
        `evictor` is a name of `strop.core.evict.ONLINE`, which hears what computing a block again costs (by
        default in operations of this model) and how likely a block is used again. A `codec` packs pages, of
        which `open_pages` stay in 16 bits: see `PagedStore`. Raises StropError for an evictor that there is
        not, a model whose keys cannot be moved, and sizes that do not fit.
        """
        self.texts = Texts.of(model, tokenizer)
        if evictor not in ONLINE:
            raise StropError(f"there is no evictor {evictor!r}: choose one of {', '.join(ONLINE)}")
        pages = self.texts.pages(pages, page)
        cost = operations(self.texts.model, page) if cost is None else cost
        around = Surroundings(pages, cost, Reuse(LIFESPAN_S) if reuse is None else reuse)
        self.store = PagedStore(self.texts.model, pages, page, ONLINE[evictor](around), codec, open_pages)
        self.engine = Engine(self.texts.model, self.store, chunks, clock)

    def generate(
        self, turn: Turn, max_new_tokens: int = 64, seed: int | None = None, temperature: float = 1.0
    ) -> Answer:
        """Continue a conversation, given whole: what is cached of it is used, wherever it stands.

        Greedy without a seed; with one, tokens are drawn at `temperature` with noise keyed by (seed,
        position), as by `strop.Model.generate`. Raises StropError for an empty conversation and one that
        exceeds the model's context or the store.
        """
        request = self.request(turn, max_new_tokens, seed, temperature)
        self.engine.finish([request])
        return request.answer(self.texts.decode(request.output))

    def request(
        self, turn: Turn, max_new_tokens: int = 64, seed: int | None = None, temperature: float = 1.0
    ) -> Request:
        """What `generate` does as a request for `engine`, to be run beside others."""
        chat = isinstance(turn, list | tuple) and len(turn) > 0 and isinstance(turn[0], dict)
        return Request(
            self.texts.chat(turn) if chat else self.texts.encode(turn, special=True),
            max_new_tokens,
            ends=self.texts.ends,
            sampler=None if seed is None else KeyedSampler(seed, [0], [0], temperature),
        )


def operations(model: PreTrainedModel, page: int) -> RecomputeCost:
    """What computing a block again costs by its place, in operations: evictors compare ratios alone."""
    config = model.config.get_text_config(decoder=True)
    shape = KVShape.of(config, model.dtype.itemsize)
    attention = 4.0 * shape.layers * config.num_attention_heads * shape.dim
    return RecomputeCost.of(2.0 * model.num_parameters(exclude_embeddings=True), attention, page)
