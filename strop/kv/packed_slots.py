"""Slots of which most are packed: survivors of an eviction in tiles, a reserve in the model's dtype.

At an eviction the highest scored of the unpacked tokens are spared, the newest stay, and the others become
a tile, in order of time; then the lowest scored tiles go. A tile is coded once and leaves as a whole. To code
the survivors of every eviction again would leave the choice to each token, but then errors add up: at 2 bits
the KL was several times as large (docs/log.md).
"""

from collections.abc import Callable, Sequence

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
        self,
        codec: TileCodec,
        count: int,
        pool: Callable[[Tensor], Tensor],
        budget: int,
        buffer: int,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """Evicted rows have `count` tiles, scored by `pool` of their tokens' scores `[..., group]`."""
        super().__init__(budget, buffer, keys, values)
        batch, heads, _, dim = keys.shape
        self.codec, self.count, self.pool = codec, count, pool
        self.period = codec.group
        self.fused = codec.fused(dim, keys.device.type)
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
        return super().room - self.coding

    # Attention.

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        if not self.coded.any():
            return super().attend(query, mask, scaling, softcap)
        mask = self.plain(query, mask)
        if self.fused is None or mask is not None or query.shape[2] > 1 or query.requires_grad:
            return self._attend_regions(query, mask, scaling, softcap)
        end = int(self.length.max())
        own = None if self._level() else self._taken(end).to(query.device)
        table = torch.arange(len(self.coded) * self.count, device=query.device).view(-1, self.count)
        if not self.coded.all():
            table = table.where(self.coded.to(query.device)[:, None], -1)
        plain = self.keys[:, :, :end], self.values[:, :, :end]
        return self.fused(
            query, *plain, own, self.records.flatten(0, 1), table, scaling=scaling, softcap=softcap
        )

    def _attend_regions(
        self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> Tensor:
        """Attention in plain torch, over tiles and slots, joined by log-sum-exp."""
        end, device = int(self.length.max()), query.device
        rows = group_queries(query, self.keys.shape[1])
        packed = self.seen_by(query, mask, self.packed) & self.coded.to(device)[:, None, None, None]
        plain = self.seen_by(query, mask, self.positions[:, :, :end])
        plain &= self._taken(end).to(device)[:, None, None]
        scores = cap(self.codec.scores(rows, self.records) * scaling, softcap)
        parts = [
            partial_attention(
                scores, packed, lambda w: self.codec.accumulate(w, self.records, query.shape[-1])
            ),
            attend_dense(rows, self.keys[:, :, :end], self.values[:, :, :end], plain, scaling, softcap),
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
        keys, values = (take(x, order) for x in found[:2])
        return keys, values, found[2].gather(-1, order)

    def keep(self, rows: Tensor, scores: Tensor) -> None:
        kernel, pick, end = kernels(scores.device.type), self._pick(rows), int(self.length[rows[0]])
        positions = self.candidates(rows)[2].contiguous()

        def scored(places: Tensor) -> Tensor:
            return scores.gather(-1, torch.searchsorted(positions, places.contiguous()))

        plain = super().candidates(rows)
        own = scored(plain[2])
        spared = kernel.keep_top(own, self.budget - self.coding - self.buffer).long()
        tiles = (own.shape[-1] - spared.shape[-1]) // self.codec.group
        rest = own.clamp(min=torch.finfo(own.dtype).min).scatter(-1, spared, -torch.inf)
        others = kernel.keep_top(rest, tiles * self.codec.group).long()
        records, places = self._coded(*(take(x, others) for x in plain[:2])), plain[2].gather(-1, others)
        if self.coded[rows[0]]:
            records = torch.cat([self.records[pick], records], 1)
            places = torch.cat([self.packed[pick], places], 2)
        pooled = self.pool(scored(places).unflatten(-1, (-1, self.codec.group)))
        self._hold(rows, records, places, kernel.keep_top(pooled, self.count).long())
        survivors = (*(take(x, spared) for x in plain[:2]), plain[2].gather(-1, spared))
        for x, old in zip((self.keys, self.values, self.positions), survivors, strict=True):
            newest = x[pick][:, :, end - self.buffer : end]
            x[pick, :, : spared.shape[-1] + self.buffer] = torch.cat([old, newest], 2)
        self.length = self.length.index_fill(0, rows, self.budget - self.coding)
        self._shrink()

    def _coded(self, keys: Tensor, values: Tensor) -> Tensor:
        """Tiles `[b, n, H_kv, bytes]` of `[b, H_kv, n * group, D]` keys and values."""
        return self.codec.encode(
            *(x.unflatten(2, (-1, self.codec.group)).transpose(1, 2) for x in (keys, values))
        )

    @torch.inference_mode(False)
    def _hold(self, rows: Tensor, records: Tensor, places: Tensor, kept: Tensor) -> None:
        """Hold `kept` `[b, H_kv, count]` of tiles `[b, n, H_kv, bytes]` whose tokens came at `places`."""
        if not self.coded.any():
            batch, heads = self.keys.shape[:2]
            self.records = records.new_zeros(batch, self.count, heads, records.shape[-1])
            self.packed = places.new_zeros(batch, heads, self.coding)
        pick = self._pick(rows)
        self.records[pick] = take(records.transpose(1, 2), kept).transpose(1, 2)
        self.packed[pick] = take(places.unflatten(-1, (-1, self.codec.group)), kept).flatten(2)
        self.coded = self.coded.index_fill(0, rows, True)

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
        require(self.coded.shape == (batch,) and self.coded.dtype == torch.bool, "rows of another batch")
        require(self.records.dtype == torch.uint8, "records that are no bytes")
        require(self.packed.dtype == torch.int32, "positions that are no integers")
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


def take(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens `[B, H, m, D]` at `places` `[B, H, m]` of `[B, H, n, D]`."""
    return tokens.gather(2, places[..., None].expand(-1, -1, -1, tokens.shape[-1]))
