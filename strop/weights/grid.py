"""The numbers that a group of weights may take, and rounding to the nearest of them.

A weight is (code - zero) * scale. Grids of 2 to 8 bits are those of compressed-tensors' WnA16 schemes; a
symmetric grid of 1 bit is sign times mean magnitude. Left out: grids that are not evenly spaced.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_HALF = 2.0**-24
"""The smallest number of float16; normal ones begin too high for scales of small weights."""
FARTHEST = 64
"""Most steps of 1 bit between zero and the mean of a group, so that 16 bits hold where zero is."""


@dataclass(frozen=True)
class Grid:
    """`2**bits` evenly spaced numbers for each group of weights."""

    bits: int
    """Width of a code, 1 to 8."""
    group: int | None = None
    """Input channels that share one scale; None gives one scale per output channel."""
    symmetric: bool = True
    """Whether zero sits in the middle; otherwise every group stores where it is."""

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9):
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group must be positive or None, got {self.group}")

    @property
    def middle(self) -> float:
        """The code that means zero where none is stored."""
        return 0.5 if self.bits == 1 else float(2 ** (self.bits - 1))

    def width(self, inputs: int) -> int:
        """Input channels that share one scale in a matrix `[O, inputs]`."""
        return self.group or inputs

    def effective_bits(self, inputs: int, itemsize: int = 2) -> float:
        """Bits a weight of `[O, inputs]` takes with its scales and zeros, of `itemsize` bytes each."""
        stored = 1 if self.symmetric else 2
        return self.bits + stored * 8 * itemsize / self.width(inputs)

    def __str__(self) -> str:
        group = "" if self.group is None else f" group={self.group}"
        return f"int{self.bits}{group}{'' if self.symmetric else ' asymmetric'}"


class Codes(NamedTuple):
    """A quantized matrix."""

    codes: Tensor
    """`[O, I]` uint8, each below `2**bits`."""
    scale: Tensor
    """`[O, I / group]` in the dtype of the weight."""
    zero: Tensor | None
    """`[O, I / group]`, the same dtype, in units of codes; None where the grid is symmetric."""


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
    """The matrix `[O, I]` in the dtype of `scale` `[O, I / group]`; `zero` is as `scale`, or one for all."""
    grouped = codes.to(scale.dtype).unflatten(-1, (scale.shape[-1], -1))
    zero = zero.unsqueeze(-1) if isinstance(zero, Tensor) else zero
    return grouped.sub_(zero).mul_(scale.unsqueeze(-1)).flatten(-2)


def restored(quantized: Codes, grid: Grid) -> Tensor:
    """The matrix `[O, I]` that a quantized one stands for."""
    zero = grid.middle if quantized.zero is None else quantized.zero
    return dequantize(quantized.codes, quantized.scale, zero)


def round_to_nearest(weight: Tensor, grid: Grid) -> Codes:
    """Quantize `weight` `[O, I]` with scales that let every entry come within half a step."""
    scale, zero = scales(weight, grid)
    return Codes(encode(weight, scale, zero, grid), scale, zero)


def scales(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scale and zero `[O, I / group]` of every group of `weight` `[O, I]`, in its dtype.

    Symmetric: the steps span twice the largest magnitude. A scale rounded to the nearest 16-bit number could
    leave that magnitude out of reach of the last code, so it is rounded up. Asymmetric: they span what lies
    between the smallest and largest weight, zero included, and zero is a whole code. One bit takes the mean
    of the group plus or minus the mean distance from it, and the mean is 0 where the grid is symmetric.
    """
    grouped = weight.float().unflatten(-1, (-1, grid.width(weight.shape[-1])))
    if grid.bits == 1:
        mean = torch.zeros_like(grouped[..., 0]) if grid.symmetric else grouped.mean(-1)
        distance = (grouped - mean.unsqueeze(-1)).abs().mean(-1)
        scale = _round_up(torch.maximum(2 * distance, mean.abs() / FARTHEST), weight.dtype)
        return scale, None if grid.symmetric else (0.5 - mean / scale.float()).to(weight.dtype)
    if grid.symmetric:
        return _round_up(_over(grouped.abs().amax(-1), (2**grid.bits - 1) / 2), weight.dtype), None
    low, high = grouped.amin(-1).clamp_max_(0), grouped.amax(-1).clamp_min_(0)
    scale = _round_up(_over(high - low, 2**grid.bits - 1), weight.dtype)
    return scale, (-low / scale.float()).round_().to(weight.dtype)


def encode(weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """The nearest codes `[O, I]` uint8 of `weight` `[O, I]` under scales and zeros `[O, I / group]`."""
    grouped = weight.float().unflatten(-1, (scale.shape[-1], -1))
    middle = grid.middle if zero is None else zero.float().unsqueeze(-1)
    steps = (grouped / scale.float().unsqueeze(-1)).add_(middle).round_()
    return steps.clamp_(0, 2**grid.bits - 1).to(torch.uint8).flatten(-2)


def _over(values: Tensor, steps: float) -> Tensor:
    """`values / steps`, the same on all devices: CUDA multiplies by the rounded inverse of a plain number."""
    return values / torch.full_like(values, steps)


def _round_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest positive numbers of `dtype` that are at least `values`, normal ones but for float16."""
    nearest = values.to(dtype)
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    return torch.where(nearest < values, above, nearest).clamp_min(
        2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    )
