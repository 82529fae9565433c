"""Two caches compared tile by tile: one reads after the other, judges its codes and takes them over.

Computed in another order, tokens differ by float32's rounding errors, and a number on the edge between two
codes may get either. Did both caches keep their own, all that is read behind would differ by what that code
does. With shared codes every tile is of tokens that differ by rounding errors only.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from strop.kv.codec import AUX, FP16, RowCodec, Tile
from strop.kv.tiled import TiledLayer

Rounding = Callable[[Tensor], Tensor]
NEAR = 1e-4
"""How far from an edge a number may be rounded the other way: in steps, scales in parts of themselves."""


class Follower:
    """The codec of a layer that packs what another one, `leader`, has packed."""

    def __init__(self, leader: TiledLayer) -> None:
        self.leader, self.tiles = leader, 0
        self.same = True
        """Whether all records so far were those of the tokens to encode."""

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        """The leader's next records, for tokens `[n, H_kv, G, D]`."""
        records = self.leader.store.records[self.tiles : self.tiles + len(keys)]
        assert len(records) == len(keys), "the leader reads first"
        self.tiles += len(keys)
        self.same &= are_codes(self.leader.codec, records, keys, values)
        return records

    def __getattr__(self, name: str) -> Any:
        return getattr(self.leader.codec, name)


def follow(cache: Cache, leader: Cache) -> None:
    """Have an empty cache follow one that always reads before it does."""
    for layer, ahead in zip(cache.attending, leader.attending, strict=True):
        layer.codec = Follower(ahead)


def same_codes(cache: Cache, follower: Cache) -> bool:
    """Whether a cache and one that follows it coded the same tokens, and hold the same ones uncoded."""
    cache.check()
    same = True
    for layer, beside in zip(cache.attending, follower.attending, strict=True):
        beside.commit()
        one, other = layer.store, beside.store
        assert one.table.shape[1] > 2 and torch.equal(one.table, other.table)
        assert one.keys.shape == other.keys.shape
        plain = torch.stack([one.keys - other.keys, one.values - other.values])
        same &= beside.codec.same and bool(plain.abs().max() < 1e-4)
    return same


def are_codes(codec: RowCodec, records: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether records `[..., bytes]` are those of tokens `[..., G, D]` float32, save numbers on an edge."""
    dim = keys.shape[-1]
    keys, values = codec._rotate(keys).transpose(-1, -2), codec._rotate(values)
    sides = (codec._keys, keys, codec.bits_k), (codec._values, values, codec.bits_v)
    return all(_rounds_to(read(records, dim), tile, bits, codec) for read, tile, bits in sides)


def _rounds_to(held: Tile, tile: Tensor, bits: int, codec: RowCodec) -> bool:
    """The same of one tile `[..., R, C]`; what is stored first is taken as it is for what depends on it."""
    most, aux = 2**bits - 1, AUX[codec.aux_dtype]
    balanced = True
    if codec.balance is not None:
        column = codec.balance(tile)[1]
        balanced = _agrees(held.column, column, column, lambda x: aux.load(aux.store(x)))
        tile = tile / held.column.unsqueeze(-2)
    low, scale = tile.amin(-1), (tile.amax(-1) - tile.amin(-1)) / most
    code = (tile - held.zero.unsqueeze(-1)) / held.scale.unsqueeze(-1)
    return (
        balanced
        and _agrees(held.scale, scale, scale, lambda x: aux.load(aux.store(x)))
        and _agrees(held.zero, low, scale, lambda x: FP16.load(FP16.store(x)))
        and _agrees(held.codes, code, 1, lambda x: x.round().clamp(0, most))
    )


def _agrees(held: Tensor, number: Tensor, step: Tensor | int, rounded: Rounding) -> bool:
    """Whether `held` is `number` rounded, or rounded the other way where that is within `NEAR` of an edge.

    Rounding is monotone, so it lies between the roundings of what is `NEAR` steps less and more.
    """
    least, largest = rounded(number - NEAR * step), rounded(number + NEAR * step)
    return bool(((least <= held) & (held <= largest)).all())
