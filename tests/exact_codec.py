"""A tile codec that keeps every bit, so that whatever differs is the storage's or the attention's fault."""

from dataclasses import dataclass

import torch
from torch import Tensor

from strop.kv.tile_store import TileCodec
from strop.kv.tiled import TiledKV


class Verbatim(TileCodec):
    """Records are the float32 bytes of the keys, then of the values."""

    def __init__(self, group: int) -> None:
        self.group = group

    def check_dim(self, dim: int) -> None:
        pass

    def record_bytes(self, dim: int) -> int:
        return 8 * self.group * dim

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        return torch.cat([keys, values], -2).float().contiguous().view(torch.uint8).flatten(-2)

    def decode(self, records: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        return records.contiguous().view(torch.float32).unflatten(-1, (-1, dim)).chunk(2, dim=-2)


@dataclass(frozen=True, kw_only=True)
class Exact(TiledKV):
    """Tiles of eight tokens, kept verbatim."""

    group: int = 8
    tail: int = 8

    def codec(self) -> Verbatim:
        return Verbatim(self.group)
