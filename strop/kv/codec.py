"""Row-wise rounding of rotated, balanced tiles: one codec behind KVarN and its baselines.

Keys are tiled channels x tokens, values tokens x channels; each row gets a scale and a zero point, and when
the tile was balanced each column a scale of its own: x = (code * scale_row + zero_row) * scale_col. Scores
and sums of values are computed on the codes themselves, with the scales folded into query and weights
(arXiv 2606.03458, sections 3.3 and appendix A).

Codes are rounded against the scales as they are stored, so that the 8-bit scales cost no bias.
"""

from dataclasses import InitVar, dataclass
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from strop.core.bits import BYTE_WIDTHS, pack, packed_bytes, unpack
from strop.core.hadamard import hadamard, rotate
from strop.kernels.tiles import Fields, Kernels, TileForm, kernels
from strop.kv.tile_store import Fused, TileCodec
from strop.kv.tiled import TiledKV

FP16_MAX = torch.finfo(torch.float16).max
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
FP8_TINY = torch.finfo(torch.float8_e4m3fn).smallest_normal / 8


class Balance(Protocol):
    """How a tile's deviations are evened out: VarN with its settings (`strop.kv.kvarn`)."""

    @property
    def n_iter(self) -> int:
        """Iterations."""

    @property
    def normalize(self) -> str:
        """What tiles are divided by first: "min_std" or "none"."""

    def __call__(self, tile: Tensor) -> tuple[Tensor, Tensor]:
        """Scales `[..., R]` of the rows and `[..., C]` of the columns of a tile `[..., R, C]` float32."""


class Half:
    """Numbers in fp16."""

    def bytes(self, count: int) -> int:
        """Bytes of `count` numbers."""
        return 2 * count

    def store(self, numbers: Tensor) -> Tensor:
        """`[..., n]` float32 to bytes."""
        return numbers.clamp(-FP16_MAX, FP16_MAX).half().contiguous().view(torch.uint8)

    def load(self, data: Tensor) -> Tensor:
        """Bytes to `[..., n]` float32."""
        return data.contiguous().view(torch.float16).float()


class Eighth(Half):
    """Positive scales in FP8 E4M3 under one fp32 factor a tile: the paper's 2.25 bits an element.

    A scale too small for its tile becomes the smallest there is, lest its row or column vanish.
    """

    def bytes(self, count: int) -> int:
        return count + 4

    def store(self, numbers: Tensor) -> Tensor:
        factor = numbers.amax(-1, keepdim=True).clamp(min=1e-30) / FP8_MAX
        small = (numbers / factor).clamp(min=FP8_TINY).to(torch.float8_e4m3fn)
        return torch.cat([small.view(torch.uint8), factor.view(torch.uint8)], -1)

    def load(self, data: Tensor) -> Tensor:
        factor = data[..., -4:].contiguous().view(torch.float32)
        return data[..., :-4].contiguous().view(torch.float8_e4m3fn).float() * factor


FP16 = Half()
AUX = {"fp16": FP16, "fp8": Eighth()}


class Tile(NamedTuple):
    """A tile as it is read back, `code * scale + zero` per row, times `column` per column."""

    codes: Tensor
    """`[..., R, C]` float32 integers."""
    scale: Tensor
    """`[..., R]`."""
    zero: Tensor
    """`[..., R]`."""
    column: Tensor | None
    """`[..., C]`; None when the tile was not balanced."""

    def values(self) -> Tensor:
        """The tile `[..., R, C]`."""
        rows = self.codes * self.scale.unsqueeze(-1) + self.zero.unsqueeze(-1)
        return rows if self.column is None else rows * self.column.unsqueeze(-2)

    def weigh(self, rows: Tensor) -> Tensor:
        """`rows @ values()` for `rows` `[..., n, R]`, with the scales folded into rows and result."""
        out = (rows * self.scale.unsqueeze(-2)) @ self.codes
        out += (rows * self.zero.unsqueeze(-2)).sum(-1, keepdim=True)
        return out if self.column is None else out * self.column.unsqueeze(-2)


@dataclass(frozen=True)
class Layout:
    """How a tile of R rows by C columns lies in bytes."""

    fields: tuple[str, ...]
    rows: int
    columns: int
    bits: int
    aux: Half
    balance: Balance | None

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of each field, in order."""
        size = {
            "codes": packed_bytes(self.rows * self.columns, self.bits),
            "scale": self.aux.bytes(self.rows),
            "zero": FP16.bytes(self.rows),
            "column": self.aux.bytes(self.columns) if self.balance else 0,
        }
        return [size[field] for field in self.fields]

    @cached_property
    def bytes(self) -> int:
        """Bytes of the tile."""
        return sum(self.sizes)

    def at(self, start: int) -> Fields:
        """Where each field lies, in a record in which the tile lies at byte `start`."""
        return Fields(**dict(zip(self.fields, accumulate(self.sizes, initial=start), strict=False)))

    def write(self, tile: Tensor) -> Tensor:
        """Round `[..., R, C]` float32 to bytes `[..., bytes]`.

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
        """Bytes `[..., bytes]` to a tile."""
        part = dict(zip(self.fields, data.split(self.sizes, dim=-1), strict=True))
        return Tile(
            unpack(part["codes"], self.bits).unflatten(-1, (self.rows, self.columns)).float(),
            self.aux.load(part["scale"]),
            FP16.load(part["zero"]),
            self.aux.load(part["column"]) if self.balance else None,
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

    def record_bytes(self, dim: int) -> int:
        """Bytes of the two tiles, rounded up to 8."""
        keys, values = layouts(self, dim)
        return -(-(keys.bytes + values.bytes) // 8) * 8

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        form = tile_form(self, keys.shape[-1])
        fast = _kernels(form, keys.device.type)
        return fast.encode(keys, values, form) if fast else self.encode_plainly(keys, values)

    def encode_plainly(self, keys: Tensor, values: Tensor) -> Tensor:
        """`encode` in plain torch, on any device: what the kernels are held to."""
        dim = keys.shape[-1]
        of_keys, of_values = layouts(self, dim)
        key_tile = self._rotate(keys.float()).transpose(-1, -2).contiguous()
        parts = [of_keys.write(key_tile), of_values.write(self._rotate(values.float()))]
        record = torch.cat(parts, dim=-1)
        return pad(record, (0, self.record_bytes(dim) - record.shape[-1]))

    def decode(self, records: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        keys = self._keys(records, dim).values().transpose(-1, -2)
        return self._rotate(keys), self._rotate(self._values(records, dim).values())

    def scores(self, query: Tensor, records: Tensor) -> Tensor:
        raw = self._keys(records, query.shape[-1]).weigh(self._rotate(query).unsqueeze(1))
        return raw.permute(0, 2, 3, 1, 4).flatten(-2)

    def accumulate(self, weights: Tensor, records: Tensor, dim: int) -> Tensor:
        rows = weights.unflatten(-1, (-1, self.group)).permute(0, 3, 1, 2, 4)
        return self._rotate(self._values(records, dim).weigh(rows).sum(1))

    def fused(self, dim: int, device: str) -> Fused | None:
        form = tile_form(self, dim)
        fast = _kernels(form, device)
        return partial(fast.attend, form=form) if fast else None

    def _keys(self, records: Tensor, dim: int) -> Tile:
        layout, _ = layouts(self, dim)
        return layout.read(records[..., : layout.bytes])

    def _values(self, records: Tensor, dim: int) -> Tile:
        keys, layout = layouts(self, dim)
        return layout.read(records[..., keys.bytes : keys.bytes + layout.bytes])

    def _rotate(self, x: Tensor) -> Tensor:
        return rotate(x) if self.rotation else x


@lru_cache(maxsize=256)
def layouts(codec: RowCodec, dim: int) -> tuple[Layout, Layout]:
    """How a codec lays out keys, channels x tokens, and values, tokens x channels."""
    aux, balance, group = AUX[codec.aux_dtype], codec.balance, codec.group
    return (
        Layout(("codes", "scale", "zero", "column"), dim, group, codec.bits_k, aux, balance),
        Layout(("codes", "column", "scale", "zero"), group, dim, codec.bits_v, aux, balance),
    )


@lru_cache(maxsize=256)
def tile_form(codec: RowCodec, dim: int) -> TileForm:
    """What kernels are told of a codec."""
    keys, values = layouts(codec, dim)
    balance = codec.balance
    return TileForm(
        dim=dim,
        group=codec.group,
        bits_k=codec.bits_k,
        bits_v=codec.bits_v,
        rotation=codec.rotation,
        balanced=balance is not None,
        fp8=codec.aux_dtype == "fp8",
        n_iter=balance.n_iter if balance else 0,
        min_std=balance is not None and balance.normalize == "min_std",
        keys=keys.at(0),
        values=values.at(keys.bytes),
        record_bytes=codec.record_bytes(dim),
    )


def _kernels(form: TileForm, device: str) -> Kernels | None:
    found = kernels(device)
    return found if found and found.supports(form) else None


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
            if getattr(self, name) not in BYTE_WIDTHS:
                raise ValueError(f"{name} must be one of {BYTE_WIDTHS}, got {getattr(self, name)!r}")
        if self.aux_dtype not in AUX:
            raise ValueError(f"aux_dtype must be one of {sorted(AUX)}, got {self.aux_dtype!r}")

    def settings(self) -> str:
        return self.spell(f"k{self.bits_k}v{self.bits_v}", "bits_k", "bits_v")
