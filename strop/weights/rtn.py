"""Round to nearest: each weight becomes the closest of 2**bits evenly spaced values of its group.

No paper: this is the baseline that a weight method has to beat, with the grids of the W8A16 and W4A16 schemes
of compressed-tensors. Left out: a search for clipping ranges, and everything that looks at activations.
"""

from dataclasses import dataclass

from torch import Tensor

from strop.weights.base import Uniform
from strop.weights.grid import Codes, Grid, round_to_nearest


@dataclass(frozen=True)
class RTN(Uniform):
    """Data-free quantization; `RTN(bits=4, group=128)` is W4A16."""

    def quantize(self, weight: Tensor, grid: Grid, hessian: Tensor | None = None) -> Codes:
        """Round `weight` `[O, I]` in groups of `grid.group` input channels."""
        return round_to_nearest(weight, grid)
