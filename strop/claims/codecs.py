"""Codecs that only experiments need: an ablation, a control, and a repair of chosen errors.

`VarN` balances without rotating. `Uncoded` changes nothing, so whatever it costs is the harness's own doing.
`Repaired` is KIVI with some tokens put back exactly, to see which errors do the harm (arXiv 2606.03458,
section 3.1). All are read densely, by `strop.claims.reading`; none is meant for serving.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from strop.kv import kvarn
from strop.kv.codec import RoundedKV, RowCodec
from strop.kv.tile_store import TileCodec
from strop.kv.tiled import TiledKV


@dataclass(frozen=True, kw_only=True)
class VarN(RoundedKV):
    """Balancing without rotation: KVarN's ablation."""

    def codec(self) -> RowCodec:
        return RowCodec(self.bits_k, self.bits_v, self.group, False, kvarn.VarN(), self.aux_dtype)


@dataclass(frozen=True)
class Identity(TileCodec):
    """Stores tiles as they are, in float32."""

    group: int = 128

    def check_dim(self, dim: int) -> None:
        """Any head size will do."""

    def record_bytes(self, dim: int) -> int:
        return 2 * self.group * dim * 4

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        return torch.stack([keys, values], -3).float().flatten(-3).view(torch.uint8)

    def decode(self, records: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        tiles = records.view(torch.float32).unflatten(-1, (2, self.group, dim))
        return tiles[..., 0, :, :], tiles[..., 1, :, :]


@dataclass(frozen=True, kw_only=True)
class Uncoded(TiledKV):
    """A tiled cache whose codec changes nothing: the control."""

    def codec(self) -> Identity:
        return Identity(self.group)


@dataclass(frozen=True, kw_only=True)
class RepairedCodec(Identity):
    """Tiles as `inner` decodes them, apart from the tokens whose errors are put right."""

    inner: RowCodec
    share: float
    """Share of each tile's tokens, those with the largest errors, that counts as the worst."""
    worst: bool
    """Whether the worst are put right, or all the others."""

    def decode(self, records: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        exact = super().decode(records, dim)
        coded = self.inner.decode(self.inner.encode(*exact), dim)
        keys, values = (self._repair(x, y) for x, y in zip(exact, coded, strict=True))
        return keys, values

    def _repair(self, exact: Tensor, coded: Tensor) -> Tensor:
        error = (exact - coded).square().sum(-1)
        edge = error.topk(max(round(self.share * self.group), 1), dim=-1).values[..., -1:]
        return torch.where(((error >= edge) == self.worst).unsqueeze(-1), exact, coded)


@dataclass(frozen=True, kw_only=True)
class Repaired(RoundedKV):
    """KIVI with the worst errors of each tile put right, or all the others."""

    share: float = 0.05
    """Share of tokens that count as the worst, of keys and of values each."""
    worst: bool = True
    """Put right the worst; otherwise the rest."""

    def codec(self) -> RepairedCodec:
        inner = RowCodec(self.bits_k, self.bits_v, self.group, False)
        return RepairedCodec(group=self.group, inner=inner, share=self.share, worst=self.worst)
