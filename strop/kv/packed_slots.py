"""Slots of which most are packed: survivors of an eviction coded in tiles, a reserve in the model's dtype.

At an eviction packed tokens are decoded, compete with the others, and those that stay are coded again; the
highest scored survivors, which the method reserves, and the newest tokens are kept as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from strop.core.attention import attend_dense, cap, group_queries, merge, partial_attention, ungroup
from strop.core.cache import require
from strop.kernels.evict import kernels
from strop.kv.slot_store import SlotStore
from strop.kv.tile_store import TileCodec


class PackedSlotStore(SlotStore):
    """A `SlotStore` whose rows, once evicted from, hold `count` tiles of `group` tokens a KV head.

    `records` `[B, count, H_kv, bytes]` and `packed` `[B, H_kv, count * group]` int32, their tokens'
    ascending positions, are empty until the first eviction; `coded` `[B]`, on the host, says which rows
    have tiles.
    """

    def __init__(
        self, codec: TileCodec, count: int, budget: int, buffer: int, keys: Tensor, values: Tensor
    ) -> None:
        """`count` tiles are coded of a row's survivors; the rest are as in a `SlotStore`."""
        super().__init__(budget, buffer, keys, values)
        batch, heads, _, dim = keys.shape
        self.codec, self.count = codec, count
        self.records = keys.new_empty(batch, 0, heads, codec.record_bytes(dim), dtype=torch.uint8)
        self.packed = keys.new_empty(batch, heads, 0, dtype=torch.int32)
        self.coded = torch.zeros(batch, dtype=torch.bool)

    @property
    def coding(self) -> int:
        """Tokens that a row has packed once it has tiles."""
        return self.count * self.codec.group

    @property
    def held(self) -> Tensor:
        return self.length + self.coded * self.coding

    @property
    def room(self) -> int:
        return self.budget + self.buffer - self.coding

    # Attention.

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        if not self.coded.any():
            return super().attend(query, mask, scaling, softcap)
        mask, end = self.plain(query, mask), int(self.length.max())
        rows = group_queries(query, self.keys.shape[1])
        own = self.coded.to(query.device)[:, None, None, None]
        packed = None if mask is None and self.coded.all() else own
        if mask is not None:
            packed = own & self.seen_by(query, mask, self.packed)
        scores = cap(self.codec.scores(rows, self.records) * scaling, softcap)
        if packed is not None:
            packed = packed.expand(-1, -1, -1, scores.shape[-1])
        visible = None
        if mask is not None or query.shape[2] > 1 or not self._level():
            slots = (torch.arange(end) < self.length[:, None]).to(query.device)[:, None, None]
            visible = self.seen_by(query, mask, self.positions[:, :, :end]) & slots
        parts = [
            partial_attention(
                scores, packed, lambda w: self.codec.accumulate(w, self.records, query.shape[-1])
            ),
            attend_dense(rows, self.keys[:, :, :end], self.values[:, :, :end], visible, scaling, softcap),
        ]
        return ungroup(merge(parts).out, query)

    # Eviction.

    def candidates(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plain = super().candidates(rows)
        if not self.coded[rows[0]]:
            return plain
        pick = self._pick(rows)
        decoded = self.codec.decode(self.records[pick], self.keys.shape[-1])
        keys, values = (x.transpose(1, 2).flatten(2, 3).to(self.keys.dtype) for x in decoded)
        found = [torch.cat(pair, 2) for pair in zip((keys, values, self.packed[pick]), plain, strict=True)]
        order = found[2].argsort(-1)
        keys, values = (_take(x, order) for x in found[:2])
        return keys, values, found[2].gather(-1, order)

    def keep(self, rows: Tensor, scores: Tensor) -> None:
        keys, values, positions = self.candidates(rows)
        kernel, end = kernels(scores.device.type), int(self.length[rows[0]])
        kept = kernel.keep_top(scores, self.budget - self.buffer).long()
        highest = kernel.keep_top(scores.gather(-1, kept), kept.shape[-1] - self.coding).long()
        packed = torch.ones_like(kept, dtype=torch.bool).scatter(-1, highest, False)
        packed = kept[packed].view(*kept.shape[:2], self.coding)
        plain = kept.gather(-1, highest)
        self._code(rows, _take(keys, packed), _take(values, packed), positions.gather(-1, packed))
        pick, newest = self._pick(rows), slice(end - self.buffer, end)
        fresh = _take(keys, plain), _take(values, plain), positions.gather(-1, plain)
        for x, survivors in zip((self.keys, self.values, self.positions), fresh, strict=True):
            x[pick, :, : survivors.shape[2] + self.buffer] = torch.cat([survivors, x[pick][:, :, newest]], 2)
        self.length[rows] = self.budget - self.coding
        self._shrink()

    def _code(self, rows: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Pack `[b, H_kv, n, D]` keys and values into all tiles of `rows`."""
        batch, heads = self.keys.shape[:2]
        if not self.coded.any():
            size = self.codec.record_bytes(keys.shape[-1])
            self.records = self.records.new_zeros(batch, self.count, heads, size)
            self.packed = self.packed.new_zeros(batch, heads, self.coding)
        pick = self._pick(rows)
        tiled = (x.unflatten(2, (self.count, self.codec.group)).transpose(1, 2) for x in (keys, values))
        self.records[pick] = self.codec.encode(*tiled)
        self.packed[pick] = positions
        self.coded[rows] = True

    # The batch, and files.

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        here = rows.to(self.keys.device)
        self.records, self.packed, self.coded = self.records[here], self.packed[here], self.coded[rows.cpu()]

    def check(self) -> None:
        batch, heads, _, dim = self.keys.shape
        held = self.count if self.coded.any() else 0
        size = self.codec.record_bytes(dim)
        require(self.records.shape == (batch, held, heads, size), "records of another size")
        require(
            self.packed.shape == (batch, heads, held * self.codec.group), "packed tokens without a position"
        )
        require(self.coded.shape == (batch,), "rows of another batch")
        super().check()

    def tokens(self) -> Sequence[Tensor]:
        packed, plain = self.packed.cpu(), super().tokens()
        rows = zip(packed, plain, self.coded.tolist(), strict=True)
        return [torch.cat([one, other], 1).sort(-1).values if coded else other for one, other, coded in rows]

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"records": self.records, "packed": self.packed, "coded": self.coded}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.records, self.packed, self.coded = state["records"], state["packed"], state["coded"].cpu()


def _take(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens `[B, H, m, D]` at `places` `[B, H, m]` of `[B, H, n, D]`."""
    return tokens.gather(2, places[..., None].expand(-1, -1, -1, tokens.shape[-1]))
