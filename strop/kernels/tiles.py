"""What the kernels for packed tiles agree on: how a record lies in bytes, and which kernels serve a device.

`tiles_numba` and `tiles_triton` both offer `encode` and `attend` as described in `Kernels`; their torch twins
are in `strop.kv.codec`.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple, Protocol

from torch import Tensor

LOG_CLIP = (-0.3, 10.0)
STD_CLIP = (1e-3, 1e3)
"""Bounds of VarN's log scales and deviations."""
TIE = 2e-6
"""VarN's imbalances this near to each other, relatively, are equal in float32."""


class Fields(NamedTuple):
    """Byte offsets of a tile's parts within a record."""

    codes: int
    """R * C codes, row by row, lowest bits first."""
    scale: int
    """A number per row."""
    zero: int
    """An fp16 number per row."""
    column: int
    """A number per column, where tiles are balanced."""


@dataclass(frozen=True)
class TileForm:
    """How one KV head's `group` tokens lie in a record, and how they were made.

    A tile of keys has a row per channel and a column per token; one of values has a row per token and a
    column per channel. An element is (code * scale[row] + zero[row]) * column[column].
    """

    dim: int
    """Head size D."""
    group: int
    """Tokens per tile, G."""
    bits_k: int
    bits_v: int
    rotation: bool
    """Whether channels are rotated by the Hadamard matrix before all else."""
    balanced: bool
    """Whether tiles carry a scale per column."""
    fp8: bool
    """Scales in E4M3 followed by one fp32 factor a tile; fp16 otherwise."""
    n_iter: int
    """VarN's iterations; 0 without balancing."""
    min_std: bool
    """Whether VarN divides a tile by its smallest deviation first."""
    keys: Fields
    values: Fields
    record_bytes: int


class Kernels(Protocol):
    """What a module of tile kernels offers."""

    def supports(self, form: TileForm) -> bool:
        """Whether these kernels serve the form; the torch twins serve every one."""
        ...

    def encode(self, keys: Tensor, values: Tensor, form: TileForm) -> Tensor:
        """Pack `[..., G, D]` keys and values of any float dtype into uint8 records `[..., record_bytes]`."""
        ...

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        own: Tensor | None,
        records: Tensor,
        table: Tensor,
        form: TileForm,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Attention of the newest q tokens over plain tokens and packed tiles, in one softmax.

        `query` `[B, H_q, q, D]`; plain `keys`, `values` `[B, H_kv, n, D]` in the model's dtype, of which
        the last q are the query's own tokens and causal among themselves; `own` `[B, n]` bool, which of them
        a row reads (None: all); `records` `[N, H_kv, record_bytes]`; `table` `[B, m]` int64 on their device,
        -1 where a row has no more tiles. Returns `[B, q, H_q, D]` in the query's dtype.
        """
        ...


@lru_cache(maxsize=8)
def kernels(device_type: str) -> Kernels | None:
    """The kernels for a device type, None where their compiler is not installed."""
    compiler = {"cpu": "numba", "cuda": "triton"}.get(device_type)
    if compiler is None or find_spec(compiler) is None:
        return None
    return import_module(f"strop.kernels.tiles_{compiler}")
