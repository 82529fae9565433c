"""Where tile codecs keep their bytes: 16-bit sinks, packed tiles, 16-bit tail, ragged over the batch.

Per row of the batch the first `sinks` real tokens and the newest ones stay as they are; everything between is
packed, `group` tokens a tile. Tiles never change once written, so beams share them through a table. Positions
are columns of the padded batch; what padding is, the caller says through `first`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from strop.core.cache import require
from strop.core.compact import keep_path
from strop.core.errors import StropError

TILES_AT_ONCE = 32
Fused = Callable[..., Tensor]
"""`strop.kernels.tiles.Kernels.attend` for one form of tiles; what follows the table is given by name."""


class TileCodec(ABC):
    """Packs `group` tokens of one KV head into one record of bytes, and attends over records.

    `scores` and `accumulate` decode whole tiles here; a codec that can compute on its codes overrides them,
    and one that has kernels offers `fused`.
    """

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

    def scores(self, query: Tensor, records: Tensor) -> Tensor:
        """Unscaled logits `[B, H_kv, R, N * G]` of `query` `[B, H_kv, R, D]` on records
        `[B, N, H_kv, bytes]`."""
        return query @ _side_by_side(self.decode(records, query.shape[-1])[0]).transpose(-1, -2)

    def accumulate(self, weights: Tensor, records: Tensor, dim: int) -> Tensor:
        """Weighted sum of values `[B, H_kv, R, D]`, weights `[B, H_kv, R, N * G]`."""
        return weights @ _side_by_side(self.decode(records, dim)[1])

    def fused(self, dim: int, device: str) -> Fused | None:
        """Attention over plain tokens and records in one call, where a kernel serves the device and `dim`."""
        return None


def _side_by_side(tiles: Tensor) -> Tensor:
    """Tiles `[B, N, H_kv, G, D]` as tokens `[B, H_kv, N * G, D]`."""
    return tiles.transpose(1, 2).flatten(2, 3)


class Places(NamedTuple):
    """Which token sits in each of n places, per row of the batch."""

    columns: Tensor
    """`[B, n]`: the column of the padded batch that the place holds."""
    own: Tensor
    """`[B, n]`, bool: whether the row reads the place; a token is read in one place only."""


class TileStore:
    """Keys and values of one layer.

    `keys`, `values` `[B, H_kv, n, D]`: every row's sinks (none before the first tile is packed), then the
    tail, columns `base` and on. `records` `[tiles, H_kv, bytes]`, found through `table` `[B, m]` (-1: none).
    `table`, `first` (column of the first real token) and `sunk` (sinks in place), `[B]`, live on the host,
    and `near` is the table on the device.
    """

    def __init__(self, codec: TileCodec, sinks: int, tail: int, keys: Tensor, values: Tensor) -> None:
        """An empty store for tokens like `keys` and `values`; `sinks` and `tail` as in `TiledKV`."""
        batch, heads, _, dim = keys.shape
        self.codec, self.sinks, self.tail = codec, sinks, tail
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        self.records = keys.new_empty(0, heads, codec.record_bytes(dim), dtype=torch.uint8)
        self.table = torch.full((batch, 0), -1)
        self.first = torch.zeros(batch, dtype=torch.long)
        self.sunk = torch.zeros(batch, dtype=torch.long)
        self.base = self.sink_slots = 0
        self._note()

    def _note(self) -> None:
        """Work out, after a change, what every step asks for."""
        self.packed = (self.table >= 0).sum(1) * self.codec.group
        self.tail_start = self.first + self.sunk + self.packed
        self.pack_at = int((self.tail_start + self.sinks - self.sunk).min()) + self.tail
        tail_is_own = (self.tail_start <= self.base).all() and (self.sunk == self.sink_slots).all()
        self.even = bool(tail_is_own and (self.table >= 0).all())
        self.near = self.table.to(self.keys.device)

    @property
    def end(self) -> int:
        """Columns so far."""
        return self.base + self.keys.shape[2] - self.sink_slots

    @property
    def untouched(self) -> bool:
        """Whether `keys` and `values` hold all columns, in order."""
        return self.base == self.sink_slots == len(self.records) == 0

    # What is where.

    def slots(self) -> Places:
        """The places of `keys` and `values`."""
        sinks = torch.arange(self.sink_slots)
        tail = torch.arange(self.base, self.end).expand(len(self.first), -1)
        own = torch.cat([sinks < self.sunk[:, None], tail >= self.tail_start[:, None]], dim=1)
        return self._places(torch.cat([self.first[:, None] + sinks, tail], dim=1), own)

    def tiles(self, start: int) -> Places:
        """The places of up to `TILES_AT_ONCE` tiles of each row from the `start`-th."""
        present = self.table[:, start : start + TILES_AT_ONCE] >= 0
        own = present.repeat_interleave(self.codec.group, 1)
        offsets = torch.arange(own.shape[1]) + start * self.codec.group
        return self._places((self.first + self.sunk)[:, None] + offsets, own)

    def _places(self, columns: Tensor, own: Tensor) -> Places:
        return Places(columns.to(self.keys.device), own.to(self.keys.device))

    def records_from(self, start: int) -> Tensor:
        """The records of these tiles, `[B, m, H_kv, bytes]`; any record where there is none."""
        if len(self.table) == 1:
            return self.records[None, start : start + TILES_AT_ONCE]
        table = self.table[:, start : start + TILES_AT_ONCE]
        return self.records[table.clamp(min=0).to(self.records.device)]

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values, `[B, H_kv, T, D]` each, in the columns where they came; padding is zero."""
        if self.untouched:
            return self.keys, self.values
        places, kept = [self.slots()], [(self.keys, self.values)]
        for start in range(0, self.table.shape[1], TILES_AT_ONCE):
            places.append(self.tiles(start))
            decoded = self.codec.decode(self.records_from(start), self.keys.shape[-1])
            kept.append(tuple(x.transpose(1, 2).flatten(2, 3).to(self.keys.dtype) for x in decoded))
        columns, own = (torch.cat(parts, dim=1) for parts in zip(*places, strict=True))
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*kept, strict=True))
        return self._in_columns(keys, columns, own), self._in_columns(values, columns, own)

    def _in_columns(self, held: Tensor, columns: Tensor, own: Tensor) -> Tensor:
        batch, heads, _, dim = held.shape
        out = held.new_zeros(batch, heads, self.end, dim)
        for row in range(batch):
            out[row, :, columns[row, own[row]]] = held[row, :, own[row]]
        return out

    def check(self) -> None:
        """Raise ValueError unless every real token is held once and every record is used."""
        batch, heads, _, dim = self.keys.shape
        record = (heads, self.codec.record_bytes(dim))
        require(self.keys.shape == self.values.shape, "keys and values of different shapes")
        require(self.records.shape[1:] == record, "records of another size")
        require(self.records.dtype == torch.uint8, "records that are no bytes")
        require(self.table.dim() == 2 and len(self.table) == batch, "a table of another batch")
        require(self.first.shape == self.sunk.shape == (batch,), "rows without a start")
        require(self.sink_slots in (0, self.sinks) and 0 <= self.base <= self.end, "columns out of range")
        require((self.first >= 0).all() and (self.first <= self.end).all(), "rows that start out of range")
        require(((self.sunk == 0) | (self.sunk == self.sink_slots)).all(), "half of the sinks")
        require((self.tail_start >= self.base).all(), "a token that is in no region")
        require(((self.packed == 0) | (self.tail_start <= self.end)).all(), "more tiles than tokens")
        held = self.table >= 0
        require((held[:, :-1] >= held[:, 1:]).all() and (self.table >= -1).all(), "a hole among its tiles")
        tiles = [row[row >= 0] for row in self.table]
        require(all(len(row.unique()) == len(row) for row in tiles), "a tile twice in one row")
        used = torch.cat(tiles).unique().tolist()
        require(used == list(range(len(self.records))), "records without a place")

    # What changes it.

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take the newest tokens `[B, H_kv, q, D]`."""
        self.keys = torch.cat([self.keys, keys], dim=2)
        self.values = torch.cat([self.values, values], dim=2)

    def begin(self, first: Tensor) -> None:
        """Say which column holds each row's first real token, `[B]`."""
        self.first = first
        self._note()

    def pack(self, end: int) -> None:
        """Pack every tile that is due among the columns before `end`."""
        if end < self.pack_at:
            return
        waiting = end - self.tail_start - (self.sinks - self.sunk)
        due = ((waiting - self.tail) // self.codec.group + 1).clamp(min=0)
        moving = (due > 0) & (self.sunk < self.sinks)
        sinks = [self._sinks(held, moving) for held in (self.keys, self.values)]
        self.sunk = torch.where(moving, self.sinks, self.sunk)
        self._write(due, self.first + self.sunk + self.packed)
        self._note()
        base = int(self.tail_start.min())
        tail = self._slot(base)
        self.keys = torch.cat([sinks[0], self.keys[:, :, tail:]], dim=2)
        self.values = torch.cat([sinks[1], self.values[:, :, tail:]], dim=2)
        self.base, self.sink_slots = base, self.sinks
        self._note()

    def _slot(self, column: Any) -> Any:
        """Where the tail holds a column."""
        return column - self.base + self.sink_slots

    def _sinks(self, held: Tensor, moving: Tensor) -> Tensor:
        """The sinks `[B, H_kv, S, D]` with those of the `moving` rows copied from the tail."""
        sinks = held[:, :, : self.sink_slots]
        if not self.sink_slots:
            sinks = held.new_zeros(*held.shape[:2], self.sinks, held.shape[3])
        rows = moving.nonzero().flatten()
        slots = self._slot(self.first[rows])[:, None] + torch.arange(self.sinks)
        return sinks.index_copy(0, rows.to(held.device), _take(held, rows, slots))

    def _write(self, due: Tensor, begin: Tensor) -> None:
        """Encode `due` tiles `[B]` of each row, the first of them at column `begin` `[B]`."""
        group, count = self.codec.group, self.packed // self.codec.group
        rows = torch.arange(len(due)).repeat_interleave(due)
        nth = torch.arange(len(rows)) - (due.cumsum(0) - due)[rows]
        slots = self._slot(begin[rows] + nth * group)[:, None] + torch.arange(group)
        fresh = [
            self.codec.encode(_take(self.keys, *where), _take(self.values, *where))
            for where in zip(rows.split(TILES_AT_ONCE), slots.split(TILES_AT_ONCE), strict=True)
        ]
        width = int((count + due).max()) - self.table.shape[1]
        table = pad(self.table, (0, width), value=-1)
        table[rows, count[rows] + nth] = len(self.records) + torch.arange(len(rows))
        self.table, self.records = table, torch.cat([self.records, *fresh])

    def crop(self, remove: int) -> None:
        """Remove the newest columns. Raises StropError when that reaches into packed tokens."""
        fixed = int(torch.where(self.packed > 0, self.tail_start, self.base).max())
        if self.end - remove < fixed:
            raise StropError(
                f"cannot take back {remove} tokens: all but the last {self.end - fixed} are packed; "
                "raise max_rollback, or start from a new cache"
            )
        kept = self.keys.shape[2] - remove
        self.keys, self.values = self.keys[:, :, :kept], self.values[:, :, :kept]
        self.first = self.first.clamp(max=self.end)
        self._note()

    def keep(self, appended: int, kept: list[int]) -> None:
        """Of the newest `appended` columns keep those at `kept`; what moves or goes must be in the tail."""
        self.keys = keep_path(self.keys, appended, kept)
        self.values = keep_path(self.values, appended, kept)
        self._note()

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs, by name."""
        names = ("keys", "values", "records", "table", "first", "sunk")
        numbers = {"base": torch.tensor(self.base), "sink_slots": torch.tensor(self.sink_slots)}
        return {name: getattr(self, name) for name in names} | numbers

    def restore(self, state: dict[str, Tensor]) -> None:
        """Hold what another store's `state` says."""
        self.keys, self.values, self.records = (state[name] for name in ("keys", "values", "records"))
        self.table, self.first, self.sunk = (state[name].cpu() for name in ("table", "first", "sunk"))
        self.base, self.sink_slots = int(state["base"]), int(state["sink_slots"])
        self._note()

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may repeat, and then shares its tiles."""
        here, host = rows.to(self.keys.device), rows.cpu()
        self.keys, self.values = self.keys[here], self.values[here]
        self.first, self.sunk, table = self.first[host], self.sunk[host], self.table[host]
        table = table[:, (table >= 0).any(0)]
        used, table = table.unique(return_inverse=True)
        tiles = used[used >= 0]
        self.table = table - (len(used) - len(tiles))
        if len(tiles) < len(self.records):
            self.records = self.records[tiles.to(self.records.device)]
        self._note()


def _take(held: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Tokens `[n, H_kv, m, D]` at `slots` `[n, m]` of the batch's `rows` `[n]`."""
    return held[rows[:, None], :, slots].transpose(1, 2)
