"""Methods that code tokens in tiles: their fields, and attention over sinks, tiles and tail.

The first real tokens of a row and the newest ones stay in the model's dtype, the rest is packed, `group`
tokens a tile (`TileStore`). What the last forward pass appended, up to `max_rollback` tokens, is never
packed, so speculation can take it back.

Not covered: right padding (pad on the left, as generation does). Without `attach` no layer sees the padding
mask: pads are then stored like tokens, and take part in the tiles they fall into.
"""

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PretrainedConfig

from strop.core.attention import (
    Partial,
    attend_dense,
    cap,
    causal,
    group_queries,
    merge,
    partial_attention,
    ungroup,
)
from strop.core.cache import AttendingLayer, KVCache, first_real
from strop.core.errors import StropError
from strop.kv.base import KVMethod, KVShape
from strop.kv.tile_store import TILES_AT_ONCE, Places, TileCodec, TileStore

QUERIES_AT_ONCE = 256
QUERIES_FUSED = 64
"""Most queries that a kernel answers sooner than matrix products over decoded tiles do."""
NODES_FUSED = 32
"""The same of a tree's, for each of which a kernel unpacks every tile anew."""


@dataclass(frozen=True, kw_only=True)
class TiledKV(KVMethod):
    """A kv method that keeps sinks and tail in 16 bits and codes the tokens between in tiles."""

    group: int = 128
    """Tokens per tile, G."""
    sinks: int = 128
    """First real tokens of a row that are never coded, S."""
    tail: int = 128
    """A tile is packed as soon as this many uncoded tokens wait behind the sinks, R; at least `group`."""
    max_rollback: int = 64
    """Most tokens of the last forward pass that `crop` can take back."""

    def __post_init__(self) -> None:
        if self.group < 8 or self.group % 8:
            raise ValueError(f"group must be a positive multiple of 8, got {self.group}")
        if self.sinks < 0 or self.max_rollback < 0:
            raise ValueError("sinks and max_rollback must not be negative")
        if self.tail < self.group:
            raise ValueError(f"tail ({self.tail}) must hold at least one group ({self.group})")

    @abstractmethod
    def codec(self) -> TileCodec:
        """The codec that packs tiles."""

    def new_cache(self, config: PretrainedConfig) -> KVCache:
        codec = self.codec()
        codec.check_dim(KVShape.of(config).dim)
        return KVCache(config, self, lambda decoder: TiledLayer(decoder, self, codec))

    def tiles(self, tokens: int) -> int:
        """Tiles that a row of `tokens` tokens has packed once nothing can be taken back."""
        return max((tokens - self.sinks - self.tail) // self.group + 1, 0)

    def kv_bytes(self, shape: KVShape, tokens: int) -> int:
        tiles = self.tiles(tokens)
        dense = (tokens - tiles * self.group) * shape.token_bytes
        packed = tiles * shape.heads * self.codec().record_bytes(shape.dim)
        return shape.layers * (dense + packed) + shape.window_bytes(tokens)


class TiledLayer(AttendingLayer):
    """One attention layer's cache: a `TileStore`, and attention over its regions joined by log-sum-exp."""

    def __init__(self, config: PretrainedConfig, method: TiledKV, codec: TileCodec) -> None:
        super().__init__(config)
        self.method, self.codec, self.max_rollback = method, codec, method.max_rollback
        self.reset()

    def reset(self) -> None:
        self.store: TileStore | None = None
        self.is_initialized = False
        self.revocable = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        of_keys, of_values = key_states.shape[-1], value_states.shape[-1]
        if of_keys != of_values:
            raise StropError(
                f"this model's keys have size {of_keys} and its values {of_values}, which no kv method here "
                "can code: leave the kv slot empty"
            )
        self.store = TileStore(self.codec, self.method.sinks, self.method.tail, key_states, value_states)
        self.fused = self.codec.fused(of_keys, key_states.device.type)
        self.is_initialized = True

    @property
    def seen(self) -> int:
        return 0 if self.store is None else self.store.end

    def check(self) -> None:
        if self.store is not None:
            self.store.check()

    def append(self, keys: Tensor, values: Tensor) -> None:
        if keys.dtype != self.store.keys.dtype:
            raise StropError(
                f"this cache holds {self.store.keys.dtype} and the model computes in {keys.dtype}: "
                "start from a new cache"
            )
        self.store.append(keys, values)
        self.revocable = min(keys.shape[2] - 1, self.max_rollback)

    def settle(self) -> None:
        """Pack every tile that is due: full, and behind what the last forward pass may take back."""
        self.store.pack(self.seen - self.revocable)

    def commit(self) -> None:
        self.revocable = 0
        if self.store is not None:
            self.settle()

    @property
    def steady(self) -> int:
        return max(self.store.pack_at - self.seen - 1, 0) if self.store is not None else 0

    def keep(self, appended: int, kept: list[int]) -> None:
        if appended - 1 > self.revocable:
            raise StropError(
                f"cannot take back {appended - 1} tokens: this cache held back {self.revocable}; "
                f"raise max_rollback ({self.max_rollback}), or draft fewer"
            )
        self.store.keep(appended, kept)
        self.commit()

    def dense(self) -> tuple[Tensor, Tensor]:
        return self.store.dense()

    def state(self) -> dict[str, Tensor]:
        return {**self.store.state(), "revocable": torch.tensor(self.revocable)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.lazy_initialization(state["keys"], state["values"])
        self.store.restore(state)
        self.revocable = int(state["revocable"])
        if not 0 <= self.revocable <= self.max_rollback:
            raise ValueError(f"{self.revocable} tokens cannot be taken back")

    # Attention.

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        self._find_padding(mask)
        if self.store.untouched and softcap is None:
            out = self._attend_unpacked(query, mask, scaling)
        elif self._fusible(query, mask):
            out = self._attend_fused(query, scaling, softcap)
        elif self._fusible_tree(query, mask):
            out = self._attend_tree(query, mask, scaling, softcap)
        else:
            out = self._attend_packed(query, mask, scaling, softcap)
        self.settle()
        return out

    def _attend_unpacked(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        queries, groups = query.shape[2], query.shape[1] // self.store.keys.shape[1]
        if mask is None and 1 < queries < self.seen:
            columns = torch.arange(self.seen, device=query.device)[None]
            mask = causal(queries, columns, self.seen)
        out = scaled_dot_product_attention(
            query,
            self.store.keys.repeat_interleave(groups, 1),
            self.store.values.repeat_interleave(groups, 1),
            attn_mask=mask,
            is_causal=mask is None and queries > 1,
            scale=scaling,
        )
        return out.transpose(1, 2).contiguous()

    def _fusible(self, query: Tensor, mask: Tensor | None) -> bool:
        """Whether a kernel can answer: a few queries, no gradients, and a mask that hides only padding."""
        if self.fused is None or query.shape[2] > QUERIES_FUSED or query.requires_grad:
            return False
        if mask is None:
            return True
        if mask.shape[-1] != self.seen:
            return False
        columns = torch.arange(self.seen, device=query.device)[None]
        real = columns >= self.store.first.to(query.device)[:, None]
        return bool((mask == causal(query.shape[2], columns, self.seen) & real[:, None, None]).all())

    def _attend_fused(self, query: Tensor, scaling: float, softcap: float | None) -> Tensor:
        store = self.store
        own = None if store.even else store.slots().own
        given = query, store.keys, store.values, own, store.records, store.near
        return self.fused(*given, scaling=scaling, softcap=softcap)

    def _fusible_tree(self, query: Tensor, mask: Tensor | None) -> bool:
        """The same where queries of a single row read all before them, and any of each other."""
        if self.fused is None or query.shape[2] > NODES_FUSED or query.requires_grad or mask is None:
            return False
        if len(self.store.first) > 1 or mask.shape[1:] != (1, query.shape[2], self.seen):
            return False
        return bool(mask[..., int(self.store.first) : -query.shape[2]].all())

    def _attend_tree(self, query: Tensor, mask: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """The queries of one row as rows of a batch that share its tokens, each hiding some of the newest."""
        store, queries = self.store, query.shape[2]
        own = store.slots().own.repeat(queries, 1)
        own[:, -queries:] = mask[0, 0, :, -queries:]
        plain = (x.expand(queries, -1, -1, -1) for x in (store.keys, store.values))
        given = query.transpose(0, 2), *plain, own, store.records, store.near.repeat(queries, 1)
        return self.fused(*given, scaling=scaling, softcap=softcap).transpose(0, 1)

    def _attend_packed(
        self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> Tensor:
        """Attention in plain torch, some queries at a time."""
        seen, parts = self.seen - query.shape[2], []
        for start in range(0, query.shape[2], QUERIES_AT_ONCE):
            part = query[:, :, start : start + QUERIES_AT_ONCE]
            part_mask = None if mask is None else mask[:, :, start : start + QUERIES_AT_ONCE]
            seen += part.shape[2]
            parts.append(self._attend_regions(part, part_mask, seen, scaling, softcap))
        return torch.cat(parts, dim=1)

    def _attend_regions(
        self, query: Tensor, mask: Tensor | None, seen: int, scaling: float, softcap: float | None
    ) -> Tensor:
        store, queries = self.store, query.shape[2]
        rows = group_queries(query, store.keys.shape[1])
        parts = []
        for start in range(0, store.table.shape[1], TILES_AT_ONCE):
            visible = None
            if mask is not None or not store.even:
                visible = _visible(store.tiles(start), mask, queries, seen)
            parts.append(self._attend_tiles(rows, start, visible, scaling, softcap))
        visible = None
        if mask is not None or not store.even or queries > 1:
            visible = _visible(store.slots(), mask, queries, seen)
        parts.append(attend_dense(rows, store.keys, store.values, visible, scaling, softcap))
        return ungroup(merge(parts).out, query)

    def _attend_tiles(
        self, rows: Tensor, start: int, visible: Tensor | None, scaling: float, softcap: float | None
    ) -> Partial:
        records = self.store.records_from(start)
        scores = cap(self.codec.scores(rows, records) * scaling, softcap)
        weigh = partial(self.codec.accumulate, records=records, dim=rows.shape[-1])
        return partial_attention(scores, visible, weigh)

    def _find_padding(self, mask: Tensor | None) -> None:
        """Find where rows start that held no real token so far."""
        first = first_real(mask, self.store.first, self.seen)
        if first is not self.store.first:
            self.store.begin(first)

    # What generation does to a batch.

    def crop(self, tokens: int) -> None:
        """Remove the last -`tokens` tokens (or, if positive, all but the first `tokens`).

        Raises StropError when that reaches into tokens that are packed already.
        """
        if self.store is None:
            return
        remove = min(-tokens, self.seen) if tokens <= 0 else max(self.seen - tokens, 0)
        self.store.crop(remove)
        self.revocable = max(self.revocable - remove, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            self.store.select(torch.arange(len(self.store.first)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.store is not None:
            self.store.select(indices)


def _visible(places: Places, mask: Tensor | None, queries: int, seen: int) -> Tensor:
    """Which of the newest `queries` of `seen` tokens may read which place: `[B, 1 or h, q, n]`, bool."""
    columns, own = places.columns, places.own[:, None, None]
    if mask is None:
        return causal(queries, columns, seen) & own
    index = columns[:, None, None].expand(-1, mask.shape[1], queries, -1)
    return mask.expand(len(columns), -1, -1, -1).gather(-1, index.clamp(max=mask.shape[-1] - 1)) & own
