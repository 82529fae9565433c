"""HQQ: zero points that minimize the p-norm of the error, p < 1, which forgives outliers. No data is needed.

The method of Badri and Shaji (2023) by their library, `hqq`, on groups of input channels (its axis 1). The
library's smallest step is 5e-5, coarse for 8 bits of small weights. Left out: scales and zeros that are
quantized themselves, and the library's layers.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from strop.core.errors import StropError
from strop.weights.base import Report, Uniform, quiet
from strop.weights.grid import Codes, Grid, encode
from strop.weights.plan import BitPlan
from strop.weights.walk import Walk

WIDTHS = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class HQQ(Uniform):
    """Data-free quantization with a zero point, not a whole number, beside every scale."""

    bits: int = 4
    group: int | None = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_known(Grid(self.bits, self.group, self.symmetric))

    @property
    def whole_zeros(self) -> bool:
        return False

    def plan(self, walk: Walk, report: Report = quiet) -> BitPlan:
        """The same grid for all. Raises StropError too if `hqq` is not installed."""
        _library()
        return super().plan(walk, report)

    def quantize(self, weight: Tensor, grid: Grid, hessian: Tensor | None = None) -> Codes:
        """Quantize `weight` `[O, I]` in groups of `grid.group` input channels.

        Codes are the nearest once scale and zero are in the dtype of the weight. Raises StropError if `hqq`
        is not installed, ValueError for a symmetric grid or a width that it does not have.
        """
        _require_known(grid)
        outputs, inputs = weight.shape
        _, found = _library().quantize(
            weight.float(),
            nbits=grid.bits,
            group_size=grid.width(inputs),
            optimize=True,
            axis=1,
            bitpack=False,
            device=weight.device,
        )
        scale, zero = (found[key].clone().view(outputs, -1).to(weight.dtype) for key in ("scale", "zero"))
        return Codes(encode(weight, scale, zero, grid), scale, zero)


def _library() -> Any:
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        raise StropError(
            "weights by hqq need its library: python -m pip install 'strop[peers]', or use rtn or gptq"
        ) from error
    return Quantizer


def _require_known(grid: Grid) -> None:
    if grid.symmetric or grid.bits not in WIDTHS:
        raise ValueError(f"hqq has asymmetric grids of {WIDTHS} bits, got {grid}")
