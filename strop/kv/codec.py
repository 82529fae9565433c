"""Row-wise rounding of rotated, balanced tiles: one codec behind KVarN and its baselines.

Keys are tiled channels x tokens, values tokens x channels; each row gets a scale and a zero point, and when
the tile was balanced each column a scale of its own: x = (code * scale_row + zero_row) * scale_col. Scores
and sums of values are computed on the codes themselves, with the scales folded into query and weights
(arXiv 2606.03458, sections 3.3 and appendix A).

Codes are rounded against the scales as they are stored, so that the 8-bit scales cost no bias.
"""

from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from strop.core.bits import WIDTHS, pack, packed_bytes, unpack
from strop.core.hadamard import hadamard, rotate
from strop.kv.tiled import TileCodec, TiledKV

Balance = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Scales of a tile `[..., R, C]` float32 that even out its deviations: rows `[..., R]`, columns `[..., C]`."""

FP16_MAX = torch.finfo(torch.float16).max
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


class Half:
    """Auxiliaries in fp16."""

    def bytes(self, count: int) -> int:
        """Bytes of `count` scales."""
        return 2 * count

    def store(self, scales: Tensor) -> Tensor:
        """`[..., n]` float32 to bytes."""
        return scales.clamp(-FP16_MAX, FP16_MAX).half().contiguous().view(torch.uint8)

    def load(self, data: Tensor) -> Tensor:
        """Bytes to `[..., n]` float32."""
        return data.contiguous().view(torch.float16).float()


class Eighth(Half):
    """Scales in FP8 E4M3 under one fp32 factor a tile: the paper's accounting of 2.25 bits an element."""

    def bytes(self, count: int) -> int:
        return count + 4

    def store(self, scales: Tensor) -> Tensor:
        factor = scales.abs().amax(-1, keepdim=True).clamp(min=1e-30) / FP8_MAX
        small = (scales / factor).to(torch.float8_e4m3fn)
        return torch.cat([small.view(torch.uint8), factor.contiguous().view(torch.uint8)], -1)

    def load(self, data: Tensor) -> Tensor:
        factor = data[..., -4:].contiguous().view(torch.float32)
        return data[..., :-4].contiguous().view(torch.float8_e4m3fn).float() * factor


FP16 = Half()
AUX = {"fp16": FP16, "fp8": Eighth()}


KEY_FIELDS = ("codes", "scale", "zero", "column")
VALUE_FIELDS = ("codes", "column", "scale", "zero")


class Tile(NamedTuple):
    """A tile as it is read back, `code * scale + zero` per row, times `column` per column."""

    codes: Tensor
    """`[..., R, C]` float32 integers."""
    scale: Tensor
    """`[..., R]`."""
    zero: Tensor
    """`[..., R]`."""
    column: Tensor
    """`[..., C]`; `[..., 1]` ones when the tile was not balanced."""

    def values(self) -> Tensor:
        """The tile `[..., R, C]`."""
        rows = self.codes * self.scale.unsqueeze(-1) + self.zero.unsqueeze(-1)
        return rows * self.column.unsqueeze(-2)


@dataclass(frozen=True)
class Layout:
    """How a tile of R rows by C columns lies in bytes."""

    fields: tuple[str, ...]
    rows: int
    columns: int
    bits: int
    aux: Half
    balance: Balance | None

    def sizes(self) -> list[int]:
        """Bytes of each field, in order."""
        size = {
            "codes": packed_bytes(self.rows * self.columns, self.bits),
            "scale": self.aux.bytes(self.rows),
            "zero": 2 * self.rows,
            "column": self.aux.bytes(self.columns) if self.balance else 0,
        }
        return [size[field] for field in self.fields]

    def write(self, tile: Tensor) -> Tensor:
        """Round `[..., R, C]` float32 to bytes `[..., sum(sizes)]`.

        The row scales of balancing cancel in row-wise rounding; only the column scales remain to store.
        """
        data = {"column": tile.new_empty(*tile.shape[:-2], 0, dtype=torch.uint8)}
        if self.balance is not None:
            data["column"] = self.aux.store(self.balance(tile)[1])
            tile = tile / positive(self.aux.load(data["column"])).unsqueeze(-2)
        low, high = tile.amin(-1), tile.amax(-1)
        data["scale"] = self.aux.store((high - low) / (2**self.bits - 1))
        data["zero"] = FP16.store(low)
        scale = positive(self.aux.load(data["scale"])).unsqueeze(-1)
        codes = ((tile - FP16.load(data["zero"]).unsqueeze(-1)) / scale).round()
        codes = codes.clamp(0, 2**self.bits - 1).to(torch.uint8)
        data["codes"] = pack(codes.flatten(-2), self.bits)
        return torch.cat([data[field] for field in self.fields], dim=-1)

    def read(self, data: Tensor) -> Tile:
        """Bytes `[..., sum(sizes)]` to a tile."""
        part = dict(zip(self.fields, data.split(self.sizes(), dim=-1), strict=True))
        scale = self.aux.load(part["scale"])
        return Tile(
            unpack(part["codes"], self.bits).unflatten(-1, (self.rows, self.columns)).float(),
            scale,
            FP16.load(part["zero"]),
            self.aux.load(part["column"]) if self.balance else torch.ones_like(scale[..., :1]),
        )


def positive(scale: Tensor) -> Tensor:
    """Scales to divide by: 1 where a constant row or an empty column left none."""
    return torch.where(scale > 0, scale, 1.0)


@dataclass(frozen=True)
class RowCodec(TileCodec):
    """Rotate, balance, round by rows. KIVI, Hadamard + RTN, VarN and KVarN are this with parts left out."""

    bits_k: int
    bits_v: int
    group: int = 128
    rotation: bool = True
    """Rotate channels by the Hadamard matrix before rounding."""
    balance: Balance | None = None
    aux_dtype: str = "fp16"

    def check_dim(self, dim: int) -> None:
        if self.rotation:
            hadamard(dim)
        for bits in (self.bits_k, self.bits_v):
            packed_bytes(dim * self.group, bits)

    def record_bytes(self, dim: int) -> int:
        """Bytes of the two tiles, rounded up to 8."""
        return -(-sum(self._keys(dim).sizes() + self._values(dim).sizes()) // 8) * 8

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        dim = keys.shape[-1]
        key_tile = self._rotate(keys.float()).transpose(-1, -2).contiguous()
        parts = [
            self._keys(dim).write(key_tile),
            self._values(dim).write(self._rotate(values.float())),
        ]
        record = torch.cat(parts, dim=-1)
        return torch.nn.functional.pad(record, (0, self.record_bytes(dim) - record.shape[-1]))

    def decode(self, records: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        keys = self._key_tile(records, dim).values().transpose(-1, -2)
        return self._rotate(keys), self._rotate(self._value_tile(records, dim).values())

    def scores(self, query: Tensor, records: Tensor) -> Tensor:
        tile = self._key_tile(records, query.shape[-1])
        rows = self._rotate(query).unsqueeze(1)
        raw = (rows * tile.scale.unsqueeze(-2)) @ tile.codes
        raw = (raw + rows @ tile.zero.unsqueeze(-1)) * tile.column.unsqueeze(-2)
        return raw.permute(0, 2, 3, 1, 4).flatten(-2)

    def accumulate(self, weights: Tensor, records: Tensor, dim: int) -> Tensor:
        tile = self._value_tile(records, dim)
        rows = weights.unflatten(-1, (-1, self.group)).permute(0, 3, 1, 2, 4)
        raw = (rows * tile.scale.unsqueeze(-2)) @ tile.codes
        raw = (raw + rows @ tile.zero.unsqueeze(-1)) * tile.column.unsqueeze(-2)
        return self._rotate(raw.sum(1))

    def _keys(self, dim: int) -> Layout:
        return Layout(KEY_FIELDS, dim, self.group, self.bits_k, AUX[self.aux_dtype], self.balance)

    def _values(self, dim: int) -> Layout:
        return Layout(VALUE_FIELDS, self.group, dim, self.bits_v, AUX[self.aux_dtype], self.balance)

    def _key_tile(self, records: Tensor, dim: int) -> Tile:
        layout = self._keys(dim)
        return layout.read(records[..., : sum(layout.sizes())])

    def _value_tile(self, records: Tensor, dim: int) -> Tile:
        begin, layout = sum(self._keys(dim).sizes()), self._values(dim)
        return layout.read(records[..., begin : begin + sum(layout.sizes())])

    def _rotate(self, x: Tensor) -> Tensor:
        return rotate(x) if self.rotation else x


@dataclass(frozen=True, kw_only=True)
class RoundedKV(TiledKV):
    """A tiled kv method that rounds by rows: the fields that KVarN and its baselines share."""

    bits: InitVar[int | None] = None
    """Sets `bits_k` and `bits_v` at once."""
    bits_k: int = 4
    """Bits of a key element: 1, 2, 4 or 8."""
    bits_v: int = 2
    """Bits of a value element: 1, 2, 4 or 8."""
    aux_dtype: str = "fp16"
    """Stored scales: "fp16", or "fp8" for E4M3 scales with one fp32 factor a tile."""

    def __post_init__(self, bits: int | None) -> None:
        super().__post_init__()
        if bits is not None:
            object.__setattr__(self, "bits_k", bits)
            object.__setattr__(self, "bits_v", bits)
        for name in ("bits_k", "bits_v"):
            if getattr(self, name) not in WIDTHS:
                raise ValueError(f"{name} must be one of {WIDTHS}, got {getattr(self, name)!r}")
        if self.aux_dtype not in AUX:
            raise ValueError(f"aux_dtype must be one of {sorted(AUX)}, got {self.aux_dtype!r}")

    def settings(self, short: str = "", *said: str) -> str:
        return super().settings(f"k{self.bits_k}v{self.bits_v}", "bits_k", "bits_v")
