"""GPTQ: columns are rounded one after another, and those still to come make up for the error so far.

arXiv 2210.17323, Algorithm 1, on the grids of round to nearest; the inverse Hessian of the inputs says how.
The order by activation keeps groups as they lie in memory, so that every kernel reads the result. Unlike in
the authors' code, input channels that were always zero are rounded and not cleared.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from strop.weights.base import Uniform
from strop.weights.grid import Codes, Grid, encode, restored, round_to_nearest, scales
from strop.weights.text import Calibrated

ATTEMPTS = 6


@dataclass(frozen=True)
class GPTQ(Calibrated, Uniform):
    """Calibrated quantization; the defaults are W4A16."""

    bits: int = 4
    group: int | None = 128
    percdamp: float = 0.01
    """Share of the mean of the Hessian's diagonal that is added to it."""
    block: int = 128
    """Columns after which the rest of the matrix is updated."""
    act_order: bool = False
    """Whether the columns with the largest inputs come first; scales are then those of the matrix before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.percdamp <= 0 or self.block < 1:
            raise ValueError(f"percdamp and block must be positive, got {self.percdamp} and {self.block}")

    def quantize(self, weight: Tensor, grid: Grid, hessian: Tensor | None = None) -> Codes:
        """Quantize `weight` `[O, I]` for inputs of Hessian `[I, I]`; without one, round to nearest.

        Raises ValueError if the Hessian is far from positive semi-definite.
        """
        if hessian is None or not hessian.any():
            return round_to_nearest(weight, grid)
        inputs, width = weight.shape[1], grid.width(weight.shape[1])
        order = torch.arange(inputs, device=weight.device)
        if self.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
        groups = [scales(part, grid) for part in weight.split(width, 1)]
        group_of = order.div(width, rounding_mode="floor").tolist()
        upper = inverse_factor(hessian[order][:, order], self.percdamp)
        left = weight.float().T[order]  # [I, O], so that a column is contiguous
        codes = torch.empty_like(left, dtype=torch.uint8)
        step = self._step(grid)
        for start in range(0, inputs, step):
            stop = min(start + step, inputs)
            errors = torch.empty_like(left[start:stop])
            for place in range(start, stop):
                if not self.act_order and place % width == 0:
                    groups[place // width] = scales(left[place : place + width].T.to(weight.dtype), grid)
                scale, zero = groups[group_of[place]]
                column = left[place].unsqueeze(1)
                code = encode(column, scale, zero, grid)
                error = (column - restored(Codes(code, scale, zero), grid)).squeeze(1) / upper[place, place]
                left[place + 1 : stop].addr_(upper[place, place + 1 : stop], error, alpha=-1)
                codes[place], errors[place - start] = code.squeeze(1), error
            left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        return Codes(codes[order.argsort()].T.contiguous(), *_joined(groups))

    def _step(self, grid: Grid) -> int:
        """About `block` columns, but whole groups: the scales of a group are those of the updated matrix."""
        width = grid.group or self.block
        return max(self.block // width, 1) * width


def inverse_factor(hessian: Tensor, percdamp: float) -> Tensor:
    """The upper triangular U with U^T U = H^-1, both `[I, I]`, after damping.

    U^-1 is the Cholesky factor of H with both axes reversed, reversed back, so H itself is never inverted.
    Damping grows tenfold until the factor exists; ValueError if it never does.
    """
    reverse = hessian.flip(0, 1)
    damping = percdamp * reverse.diagonal().mean()
    for attempt in range(ATTEMPTS):
        reverse.diagonal().add_(damping * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(reverse)
        if not failed:
            identity = torch.eye(len(reverse), dtype=reverse.dtype, device=reverse.device)
            return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    raise ValueError("the Hessian is not positive semi-definite")


def _joined(groups: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    scale, zero = zip(*groups, strict=True)
    return torch.cat(scale, 1), None if zero[0] is None else torch.cat(zero, 1)
