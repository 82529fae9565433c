"""Methods that keep a bounded number of tokens: their fields, the storage, and when to evict.

Every KV head keeps its own K tokens: the newest `buffer`, and those of the others that the method scores
highest. Whenever `buffer` more have come, the lowest scored go (arXiv 2606.03928, section 2). Keys keep the
rotation of the position where they came.

Differs from the released code: survivors stay in order of time, so that smoothing pools neighbours in time;
rows may have different lengths; what the first forward pass brings, the prompt, is cut at the next one.

Not covered: speculation (an evicted token cannot come back), right padding, attention other than strop's.
"""

import itertools
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from strop.core.cache import IMPLEMENTATION, AttendingLayer, KVCache, first_real, require
from strop.core.errors import StropError
from strop.kv.base import KVMethod, KVShape
from strop.kv.packed_slots import PackedSlotStore
from strop.kv.slot_store import SlotStore
from strop.kv.tile_store import TileCodec
from strop.kv.tiled import TiledKV


class Candidates(NamedTuple):
    """The tokens that an eviction chooses among, of rows that hold equally many."""

    keys: Tensor
    """`[B, H_kv, n, D]`, rotated to their positions."""
    values: Tensor
    """`[B, H_kv, n, D]`."""
    positions: Tensor
    """`[B, H_kv, n]` int32, ascending: how many tokens of the row came before."""
    queries: Tensor
    """`[B, H_q, W, D]`: the newest W queries, in no order."""
    scaling: float
    layer: int
    seen: int
    """Tokens of the row so far, which tells one eviction from the next."""


@dataclass(frozen=True, kw_only=True)
class EvictingKV(KVMethod):
    """A kv method that keeps `budget` tokens a KV head, and up to `buffer` more until they are evicted."""

    budget: int = 1024
    """Tokens kept by an eviction, the newest `buffer` included, K; a multiple of `buffer`."""
    buffer: int = 64
    """Newest tokens that are never evicted, B; without a store also the tokens between evictions."""

    store: TiledKV | None = None
    """Codes survivors by its codec, a tile of its group at every eviction, and whole tiles are evicted; the
    highest scored and the newest stay as they are, so its own sinks and tail are not used."""

    window: ClassVar[int] = 0
    """Newest queries that the scores ask for."""

    def __post_init__(self) -> None:
        if self.buffer < 1 or self.budget <= self.buffer:
            raise ValueError(
                f"budget ({self.budget}) must be above buffer ({self.buffer}), which is at least 1"
            )
        if self.budget % self.buffer:
            raise ValueError(f"budget ({self.budget}) must be a multiple of buffer ({self.buffer})")
        if self.store is not None and not isinstance(self.store, TiledKV):
            raise ValueError(
                f"a {type(self.store).__name__} cannot be a store: take KVarN, KIVI or HadamardRTN"
            )
        if self.store is not None and not self.tiles:
            raise ValueError(
                f"budget ({self.budget}) leaves less than one tile of {self.store.group} tokens behind "
                f"{self.reserved} reserved and {self.buffer} newest: raise it, or take smaller groups"
            )

    @property
    def reserved(self) -> int:
        """Survivors that a store may not code."""
        return 0

    @property
    def watched(self) -> int:
        """Newest queries that a layer keeps; by the first eviction so many have come."""
        return min(self.window, self.budget)

    @property
    def tiles(self) -> int:
        """Tiles of an evicted row: as many as its survivors fill, the reserved and the newest left out."""
        return (self.budget - self.buffer - self.reserved) // self.store.group if self.store else 0

    @abstractmethod
    def scores(self, candidates: Candidates) -> Tensor:
        """Which candidates to keep: the `budget - buffer` highest of `[B, H_kv, n]` float32.

        Of equals the newest stay.
        """

    def pool(self, scores: Tensor) -> Tensor:
        """The score of a tile from those of its tokens, `[..., group]` to `[...]`."""
        return scores.sum(-1)

    def settings(self) -> str:
        return self.spell(str(self.budget), "budget")

    def spell(self, short: str = "", *said: str) -> str:
        inner = [f"in {type(self.store).__name__.lower()} {self.store.settings()}"] if self.store else []
        return " ".join([super().spell(short, *said, "store"), *inner])

    def new_cache(self, config: PretrainedConfig) -> KVCache:
        codec = self.store.codec() if self.store else None
        if codec is not None:
            codec.check_dim(KVShape.of(config).dim)
        numbers = itertools.count()
        return KVCache(config, self, lambda decoder: EvictingLayer(decoder, self, next(numbers), codec))

    def kv_bytes(self, shape: KVShape, tokens: int) -> int:
        """Once what is due has been evicted."""
        period = self.store.group if self.store else self.buffer
        full, slots = self.budget + period, -(-tokens // self.buffer) * self.buffer
        position, packed = 4 * shape.heads, 0
        if self.store and tokens >= full:
            coded = self.tiles * self.store.group
            full -= coded
            records = self.tiles * shape.heads * self.store.codec().record_bytes(shape.dim)
            packed = records + coded * position
        layer = min(slots, full) * (shape.token_bytes + position) + packed
        layer += self.watched * shape.queries * shape.dim * shape.itemsize
        return shape.layers * layer + shape.window_bytes(tokens)


class EvictingLayer(AttendingLayer):
    """One attention layer's cache: a `SlotStore`, the newest queries, and when to evict."""

    is_croppable = False

    def __init__(
        self, config: PretrainedConfig, method: EvictingKV, number: int, codec: TileCodec | None = None
    ) -> None:
        """The layer `number` of a cache; `codec` packs survivors."""
        super().__init__(config)
        self.method, self.number, self.codec = method, number, codec
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.store: SlotStore | None = None
        self.queries: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        sizes = self.method.budget, self.method.buffer
        if self.codec is None:
            self.store = SlotStore(*sizes, key_states, value_states)
        else:
            _require_equal_heads(key_states, value_states)
            tiles = self.codec, self.method.tiles, self.method.pool
            self.store = PackedSlotStore(*tiles, *sizes, key_states, value_states)
        self.is_initialized = True

    @property
    def seen(self) -> int:
        return 0 if self.store is None else self.store.columns

    def append(self, keys: Tensor, values: Tensor) -> None:
        if self.config._attn_implementation != IMPLEMENTATION:
            self.dense()
        if keys.dtype != self.store.keys.dtype:
            raise StropError(
                f"this cache holds {self.store.keys.dtype} and the model computes in {keys.dtype}: "
                "start from a new cache"
            )
        self.pending = keys, values
        self.store.columns += keys.shape[2]

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        store, before = self.store, self.store.length
        store.first = first_real(mask, store.first, store.columns)
        store.place(*self.pending)
        del self.pending
        self._watch(query)
        out = store.attend(query, mask, scaling, softcap)
        due = (before > 0) & store.due
        if due.any():
            self._evict(due, scaling)
        return out

    def _watch(self, query: Tensor) -> None:
        """Keep the newest `window` queries, in a ring."""
        window = self.method.watched
        if not window:
            return
        if self.queries is None:
            batch, heads, _, dim = query.shape
            with torch.inference_mode(False):
                self.queries = query.new_zeros(batch, heads, window, dim)
        newest = query[:, :, -window:].detach()
        ring = torch.arange(self.seen - newest.shape[2], self.seen, device=query.device) % window
        self.queries.index_copy_(2, ring, newest)

    def _evict(self, due: Tensor, scaling: float) -> None:
        """Cut the due rows to `budget` tokens, rows of equal length and age together."""
        store = self.store
        kinds = torch.stack([store.held, store.seen], 1)
        for kind in kinds[due].unique(dim=0):
            rows = (due & (kinds == kind).all(1)).nonzero().flatten()
            keys, values, positions = store.candidates(rows)
            if keys.isnan().any() or values.isnan().any():
                raise StropError(
                    "keys or values of this model are not numbers (NaN), so no token can be chosen to stay: "
                    "run it in float32, or restore its weights"
                )
            queries = None if self.queries is None else self.queries[rows.to(keys.device)]
            seen = int(kind[1])
            candidates = Candidates(keys, values, positions, queries, scaling, self.number, seen)
            store.keep(rows, self.method.scores(candidates))

    # What the cache contract asks for besides.

    def dense(self) -> tuple[Tensor, Tensor]:
        """Refused: which tokens stay is decided by head, and only strop's attention keeps their positions."""
        raise StropError(
            "a cache that evicts tokens works with strop's attention alone: call strop.kv.attach(model) first"
        )

    def settle(self) -> None:
        """Nothing waits: an eviction happens in the step that makes it due."""

    def crop(self, tokens: int) -> None:
        """Refuse to take tokens back, for some may have been evicted to make room for them."""
        if tokens < 0 or 0 < tokens < self.seen:
            raise StropError("a cache that evicts tokens cannot take any back: use it without speculation")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            self.batch_select_indices(torch.arange(len(self.store.length)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.store is None:
            return
        self.store.select(indices)
        if self.queries is not None:
            self.queries = self.queries[indices.to(self.queries.device)]

    def check(self) -> None:
        if self.store is None:
            return
        self.store.check()
        if self.method.window and self.seen:
            keys, queries = self.store.keys, self.queries
            shape = len(keys), self.config.num_attention_heads, self.method.watched, keys.shape[-1]
            require(queries is not None and queries.shape == shape, "other queries than it watches")
            require(queries.dtype == keys.dtype, "queries of another dtype")

    def state(self) -> dict[str, Tensor]:
        return self.store.state() | ({} if self.queries is None else {"queries": self.queries})

    def restore(self, state: dict[str, Tensor]) -> None:
        self.lazy_initialization(state["keys"], state["values"])
        self.store.restore(state)
        self.queries = state.get("queries")


def _require_equal_heads(keys: Tensor, values: Tensor) -> None:
    if keys.shape[-1] != values.shape[-1]:
        raise StropError(
            f"this model's keys have size {keys.shape[-1]} and its values {values.shape[-1]}, which no store "
            "here can code: leave out the store"
        )
