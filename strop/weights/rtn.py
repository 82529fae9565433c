"""Round to nearest: each weight becomes the closest of 2**bits evenly spaced values around zero.

No paper: this is the baseline that a weight method has to beat, with the symmetric grid of the
W8A16 and W4A16 schemes of compressed-tensors. Left out: zero points, a search for clipping ranges,
and everything that looks at activations (GPTQ, AWQ).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from strop.weights.base import Codes, WeightMethod


@dataclass(frozen=True)
class RTN(WeightMethod):
    """Data-free symmetric quantization of a dense model; `RTN(bits=4, group=128)` is W4A16."""

    bits: int = 8
    """Width of a code: 8 or 4."""
    group: int | None = None
    """Input channels that share one scale; None gives one scale per output channel."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits}")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group must be positive or None, got {self.group}")

    def settings(self) -> str:
        return self.spell(f"int{self.bits}", "bits")

    def quantize(self, weight: Tensor) -> Codes:
        """Round `weight` `[O, I]` in groups of `group` input channels."""
        return round_to_nearest(weight, self.bits, self.group or weight.shape[-1])


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Codes:
    """Quantize `weight` `[O, I]` so that each entry is within half its scale `[O, I / group]`.

    The 2**bits - 1 steps span twice the group's largest magnitude. A scale rounded to the nearest
    16-bit number could leave that magnitude out of reach of the last code, so it is rounded up.
    """
    grouped = weight.float().unflatten(-1, (-1, group))
    step = grouped.abs().amax(-1) / ((2**bits - 1) / 2)
    scale = _round_up(step, weight.dtype)
    zero = 2 ** (bits - 1)
    integers = (grouped / scale.float().unsqueeze(-1)).round_().clamp_(-zero, zero - 1)
    return Codes((integers + zero).to(torch.uint8).flatten(-2), scale)


def _round_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest normal positive numbers of `dtype` that are at least `values`."""
    nearest = values.to(dtype)
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    return torch.where(nearest < values, above, nearest).clamp_min(torch.finfo(dtype).tiny)
