"""The storage that tile codecs share: 16-bit sinks, packed tiles, 16-bit tail, ragged over the batch.

Per row of the batch the first `sinks` real tokens and the newest ones stay in the model's dtype; everything
between is packed, `group` tokens a tile. Tiles never change once written, so beams share them through a
table. What the last forward pass appended (up to `max_rollback` tokens) is never packed, so speculation can
take it back.

Not covered: right padding (pad on the left, as generation does).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

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
from strop.core.cache import AttendingLayer, KVCache
from strop.core.errors import StropError
from strop.kv.base import KVMethod, KVShape

QUERIES_AT_ONCE = 256
TILES_AT_ONCE = 32


class TileCodec(ABC):
    """Packs `group` tokens of one KV head into one record of bytes, and attends over records."""

    group: int

    @abstractmethod
    def check_dim(self, dim: int) -> None:
        """Raise StropError when the codec cannot serve head size `dim`."""

    @abstractmethod
    def record_bytes(self, dim: int) -> int:
        """Bytes of one record: a tile of keys and one of values, metadata included."""

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        """Pack `[..., G, D]` keys and values into records `[..., record_bytes]` uint8."""

    @abstractmethod
    def decode(self, records: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Undo `encode` up to rounding: keys and values `[..., G, D]` float32."""

    @abstractmethod
    def scores(self, query: Tensor, records: Tensor) -> Tensor:
        """Unscaled logits `[B, H_kv, R, N * G]` of `query` `[B, H_kv, R, D]` on records
        `[B, N, H_kv, bytes]`, without forming the keys."""

    @abstractmethod
    def accumulate(self, weights: Tensor, records: Tensor, dim: int) -> Tensor:
        """Weighted sum of values `[B, H_kv, R, D]`, weights `[B, H_kv, R, N * G]`, without forming them."""


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
        return KVCache(config, lambda decoder: TiledLayer(decoder, self, codec))

    def kv_bytes(self, shape: KVShape, tokens: int) -> int:
        waiting = max(tokens - self.sinks, 0)
        tiles = max((waiting - self.tail) // self.group + 1, 0)
        dense = (tokens - tiles * self.group) * shape.token_bytes
        packed = tiles * shape.heads * self.codec().record_bytes(shape.dim)
        return shape.layers * (dense + packed) + shape.window_bytes(tokens)


class TiledLayer(AttendingLayer):
    """One attention layer's cache: sinks and tail as `keys`, `values` `[B, H_kv, n, D]`, tiles as `records`.

    Slots [0, S) of `keys` hold each row's sinks once the first tile is packed; the other slots are the
    newest columns, right-aligned: the last slot is column `seen - 1`.
    """

    def __init__(self, config: PretrainedConfig, method: TiledKV, codec: TileCodec) -> None:
        super().__init__(config)
        self.method = method
        self.codec = codec
        self.reset()

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = 0
        self.revocable = 0
        self.sink_slots = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.records = torch.empty(
            0, heads, self.codec.record_bytes(dim), dtype=torch.uint8, device=key_states.device
        )
        self.table = torch.full((batch, 0), -1)
        self.first = torch.zeros(batch, dtype=torch.long)
        self.sunk = torch.zeros(batch, dtype=torch.long)
        self.is_initialized = True

    # Bookkeeping, per row of the batch, on the host.

    @property
    def packed(self) -> Tensor:
        """Tokens in tiles `[B]`."""
        return (self.table >= 0).sum(1) * self.codec.group

    @property
    def tail_start(self) -> Tensor:
        """Column of each row's first token in the tail `[B]`."""
        return self.first + self.sunk + self.packed

    def tensors(self) -> Iterable[Tensor]:
        return (self.keys, self.values, self.records, self.table, self.first, self.sunk)

    def check(self) -> None:
        """Assert the invariants: every real token is held once, and every record is used."""
        if not self.is_initialized:
            return
        slots = self.keys.shape[2] - self.sink_slots
        assert slots <= self.seen and self.keys.shape == self.values.shape
        assert (self.tail_start >= self.seen - slots).all(), "a token is in no region"
        assert (self.sunk <= self.sink_slots).all()
        used = self.table[self.table >= 0].unique()
        assert used.tolist() == list(range(len(self.records))), "orphaned or missing records"

    # The cache layer's contract.

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys = torch.cat([self.keys, keys], dim=2)
        self.values = torch.cat([self.values, values], dim=2)
        self.revocable = min(keys.shape[2] - 1, self.method.max_rollback)

    def attend(
        self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> Tensor:
        self._find_padding(mask)
        if len(self.records) == 0 and softcap is None:
            out = self._attend_unpacked(query, mask, scaling)
        else:
            seen, chunks = self.seen - query.shape[2], []
            for start in range(0, query.shape[2], QUERIES_AT_ONCE):
                rows = slice(start, start + QUERIES_AT_ONCE)
                part = query[:, :, rows]
                seen += part.shape[2]
                part_mask = None if mask is None else mask[:, :, rows]
                chunks.append(self._attend_packed(part, part_mask, seen, scaling, softcap))
            out = torch.cat(chunks, dim=1)
        self.settle()
        return out

    def dense(self) -> tuple[Tensor, Tensor]:
        if not self.sink_slots:
            return self.keys, self.values
        batch, heads, _, dim = self.keys.shape
        keys = self.keys.new_zeros(batch, heads, self.seen, dim)
        values = torch.zeros_like(keys)
        slots = self.keys.shape[2] - self.sink_slots
        keys[:, :, self.seen - slots :] = self.keys[:, :, self.sink_slots :]
        values[:, :, self.seen - slots :] = self.values[:, :, self.sink_slots :]
        for row in range(batch):
            begin, sunk = int(self.first[row]), int(self.sunk[row])
            keys[row, :, begin : begin + sunk] = self.keys[row, :, :sunk]
            values[row, :, begin : begin + sunk] = self.values[row, :, :sunk]
            tiles = self.table[row][self.table[row] >= 0]
            span = slice(begin + sunk, begin + sunk + len(tiles) * self.codec.group)
            decoded = self.codec.decode(self.records[tiles], dim)
            keys[row, :, span], values[row, :, span] = (
                x.transpose(0, 1).flatten(1, 2).to(keys.dtype) for x in decoded
            )
        return keys, values

    # Attention.

    def _attend_unpacked(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        queries, groups = query.shape[2], query.shape[1] // self.keys.shape[1]
        if mask is None and 1 < queries < self.seen:
            columns = torch.arange(self.seen, device=query.device)[None]
            mask = causal(queries, columns, self.seen)
        out = scaled_dot_product_attention(
            query,
            self.keys.repeat_interleave(groups, 1),
            self.values.repeat_interleave(groups, 1),
            attn_mask=mask,
            is_causal=mask is None and queries > 1,
            scale=scaling,
        )
        return out.transpose(1, 2).contiguous()

    def _attend_packed(
        self, query: Tensor, mask: Tensor | None, seen: int, scaling: float, softcap: float | None
    ) -> Tensor:
        rows = group_queries(query, self.keys.shape[1])
        parts = [
            self._attend_tiles(rows, mask, start, scaling, softcap)
            for start in range(0, self.table.shape[1], TILES_AT_ONCE)
        ]
        visible = self._visible_slots(query.shape[2], mask, seen)
        parts.append(attend_dense(rows, self.keys, self.values, visible, scaling, softcap))
        return ungroup(merge(parts), query)

    def _attend_tiles(
        self, rows: Tensor, mask: Tensor | None, start: int, scaling: float, softcap: float | None
    ) -> Partial:
        table = self.table[:, start : start + TILES_AT_ONCE]
        records = self.records[table.clamp(min=0).to(self.records.device)]
        scores = cap(self.codec.scores(rows, records) * scaling, softcap)
        dim = rows.shape[-1]
        return partial_attention(
            scores,
            self._visible_tiles(table, start, mask),
            lambda weights: self.codec.accumulate(weights, records, dim),
        )

    def _visible_tiles(self, table: Tensor, start: int, mask: Tensor | None) -> Tensor | None:
        """Tiles are older than any query, so only missing tiles and the mask can hide one."""
        group = self.codec.group
        if mask is None and (table >= 0).all():
            return None
        device = self.records.device
        present = (table >= 0).repeat_interleave(group, 1).to(device)[:, None, None]
        if mask is None:
            return present
        offsets = torch.arange(start * group, start * group + present.shape[-1])
        columns = (self.first + self.sunk)[:, None] + offsets
        return present & _columns(mask, columns.to(device))

    def _visible_slots(self, queries: int, mask: Tensor | None, seen: int) -> Tensor | None:
        slots = self.keys.shape[2] - self.sink_slots
        sinks = self.first[:, None] + torch.arange(self.sink_slots)
        tail = torch.arange(self.seen - slots, self.seen).expand(len(sinks), -1)
        held = torch.cat(
            [torch.arange(self.sink_slots) < self.sunk[:, None], tail >= self.tail_start[:, None]], 1
        )
        if mask is None and queries == 1 and held.all():
            return None
        device = self.keys.device
        columns = torch.cat([sinks, tail], 1).to(device)
        reach = causal(queries, columns, seen) if mask is None else _columns(mask, columns)
        return reach & held.to(device)[:, None, None]

    def _find_padding(self, mask: Tensor | None) -> None:
        """Set `first` of rows that held no real token so far; the newest query sees all of its row."""
        if mask is None:
            return
        unknown = self.first >= self.seen - mask.shape[-2]
        if not unknown.any():
            return
        sees = mask[:, 0, -1].expand(len(unknown), -1).cpu()
        first = torch.where(sees.any(-1), sees.int().argmax(-1), self.seen)
        if not (sees.sum(-1) == self.seen - first).all():
            raise StropError(
                "this batch is padded on the right or in the middle: pad on the left "
                "(tokenizer.padding_side = 'left'), as generation needs"
            )
        self.first = torch.where(unknown, first, self.first)

    # Packing.

    def settle(self) -> None:
        """Pack every tile that is due: full, and behind what the last forward pass may take back."""
        waiting = self.seen - self.tail_start - self.revocable
        waiting -= (self.method.sinks - self.sunk)
        due = ((waiting - self.method.tail) // self.codec.group + 1).clamp(min=0)
        if not due.any():
            return
        newly_sunk = torch.where(due > 0, self.method.sinks, self.sunk)
        self._move_sinks(newly_sunk)
        self._pack(due)
        self._trim()

    def _move_sinks(self, sunk: Tensor) -> None:
        """Copy the sinks of rows that pack their first tile into the sink slots."""
        moving = (sunk > self.sunk).nonzero().flatten()
        if not self.sink_slots and self.method.sinks:
            batch, heads, _, dim = self.keys.shape
            room = self.keys.new_zeros(batch, heads, self.method.sinks, dim)
            self.keys = torch.cat([room, self.keys], dim=2)
            self.values = torch.cat([room, self.values], dim=2)
            self.sink_slots = self.method.sinks
        for row in moving.tolist():
            begin = self._slot(int(self.first[row]))
            for held in (self.keys, self.values):
                held[row, :, : self.sink_slots] = held[row, :, begin : begin + self.sink_slots]
        self.sunk = sunk

    def _slot(self, column: int) -> int:
        return self.keys.shape[2] - (self.seen - column)

    def _pack(self, due: Tensor) -> None:
        group = self.codec.group
        row = torch.repeat_interleave(torch.arange(len(due)), due)
        nth = torch.cat([torch.arange(int(n)) for n in due])
        begin = self.tail_start[row] + nth * group
        slots = self.keys.shape[2] - self.seen + begin[:, None] + torch.arange(group)
        tiles = (x[row[:, None], :, slots].transpose(1, 2) for x in (self.keys, self.values))
        fresh = self.codec.encode(*tiles)
        counts = (self.table >= 0).sum(1)
        width = int((counts + due).max())
        table = torch.full((len(due), width), -1)
        table[:, : self.table.shape[1]] = self.table
        table[row, counts[row] + nth] = len(self.records) + torch.arange(len(row))
        self.records, self.table = torch.cat([self.records, fresh]), table

    def _trim(self) -> None:
        """Drop the slots that no row needs any more."""
        begin = self._slot(int(self.tail_start.min()))
        keep = self.sink_slots
        self.keys = torch.cat([self.keys[:, :, :keep], self.keys[:, :, begin:]], dim=2)
        self.values = torch.cat([self.values[:, :, :keep], self.values[:, :, begin:]], dim=2)

    # What generation does to a batch.

    def crop(self, tokens: int) -> None:
        """Remove the last -`tokens` tokens (or, if positive, all but the first `tokens`).

        Raises StropError when that reaches into tokens that are packed already.
        """
        if not self.is_initialized:
            return
        remove = -tokens if tokens <= 0 else max(self.seen - tokens, 0)
        if remove == 0:
            return
        fixed = int(torch.where(self.packed > 0, self.tail_start, 0).max())
        if self.seen - remove < fixed:
            raise StropError(
                f"cannot take back {remove} tokens: all but the last {self.seen - fixed} are packed; "
                "raise max_rollback, or start from a new cache"
            )
        self.keys, self.values = self.keys[:, :, :-remove], self.values[:, :, :-remove]
        self.seen -= remove
        self.revocable = max(self.revocable - remove, 0)
        self.first = self.first.clamp(max=self.seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self.first)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in the given order; rows may repeat and then share their tiles."""
        if not self.is_initialized:
            return
        here, host = indices.to(self.keys.device), indices.cpu()
        self.keys, self.values = self.keys[here], self.values[here]
        self.first, self.sunk = self.first[host], self.sunk[host]
        table = self.table[host]
        used, table = table.unique(return_inverse=True)
        missing = int((used < 0).sum())
        self.table = table - missing
        self.records = self.records[used[missing:].to(self.records.device)]


def _columns(mask: Tensor, columns: Tensor) -> Tensor:
    """The mask `[B, h, q, T]` at each row's `columns` `[B, n]` (out of range: hidden): `[B, h, q, n]`."""
    _, heads, queries, seen = mask.shape
    index = columns[:, None, None].expand(-1, heads, queries, -1)
    picked = mask.expand(len(columns), -1, -1, -1).gather(-1, index.clamp(max=seen - 1))
    return picked & (index < seen)
