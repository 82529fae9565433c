"""AlphaQ: bits for the experts of a mixture of experts, from the spectra of their weights (arXiv 2606.04980).

A matrix whose spectrum has a heavy tail is taken to be well trained, and gets more bits. Only the allocation
is free of data: a quantizer that calibrates may follow. Differs from the paper: `allocate` lists how.
"""

import abc
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.core.errors import StropError
from strop.weights.allocate import GRANULARITIES, NOISES, SOLVERS, WEIGHTINGS, Rules, Stat, allocate
from strop.weights.base import Uniform, WeightMethod, quiet, require_finite, require_fit, row
from strop.weights.grid import Codes, Grid, restored, round_to_nearest
from strop.weights.plan import BitPlan
from strop.weights.rtn import RTN
from strop.weights.spectrum import AlphaStat, spectral_alpha, tile_for
from strop.weights.text import Calibrated
from strop.weights.walk import Matrix, Report, Walk

CHOICES = {
    "weighting": WEIGHTINGS,
    "noise": NOISES,
    "solver": tuple(SOLVERS),
    "granularity": GRANULARITIES,
}
RTN_W4 = RTN(bits=4, group=128, symmetric=False)


@dataclass(frozen=True)
class Allocated(WeightMethod, abc.ABC):
    """A method that spends an average of bits over the experts' matrices; all others follow the quantizer."""

    bits: float = 3.5
    """The budget: bits a weight of the experts on average, without scales and zeros."""
    widths: tuple[int, ...] = (2, 3, 4)
    """Candidates."""
    quantizer: Uniform = RTN_W4
    """What makes codes of the matrices; its own bits are those of attention and shared experts."""
    weighting: str = "params"
    """Whether budget and cost count weights ("params") or matrices alike ("matrices", the paper)."""
    noise: str = "measured"
    """What rounding costs: "measured", or "theory", Var(W) 2^-2b (the paper)."""
    solver: str = "greedy"
    """"greedy", or the exact "milp"."""
    granularity: str = "matrix"
    """Who shares a width: "matrix" (nobody), "expert", or "layer" (all experts of one, as engines need)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", float(self.bits))
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        if not self.widths or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths must rise, got {self.widths}")
        least, most = min(self.grids), max(self.grids)
        if not least <= self.bits:
            raise ValueError(
                f"bits={self.bits} is below the smallest width of {least}: raise it, or allow smaller widths"
            )
        if self.bits > most:
            raise ValueError(
                f"bits={self.bits} is above the largest width of {most}: lower it, or allow larger widths"
            )

    @property
    def grids(self) -> dict[int, Grid]:
        """The quantizer's grid of each candidate width. Raises ValueError for one that it does not have."""
        return {bits: dataclasses.replace(self.quantizer, bits=bits).grid for bits in self.widths}

    @abc.abstractmethod
    def allocate(self, walk: Walk, experts: Sequence[Matrix], rules: Rules, report: Report) -> BitPlan:
        """The widths of the experts' matrices."""

    def settings(self) -> str:
        by = f"{type(self.quantizer).__name__.lower()} {self.quantizer.settings()}"
        return f"{self.spell(f'{self.bits:g} bits', 'bits', 'quantizer')} by {by}"

    @property
    def hessians(self) -> bool:
        return self.quantizer.hessians

    @property
    def whole_zeros(self) -> bool:
        return self.quantizer.whole_zeros

    @property
    def asked(self) -> Calibrated | None:
        return self if isinstance(self, Calibrated) else self.quantizer.asked

    def quantize(self, weight: Tensor, grid: Grid, hessian: Tensor | None = None) -> Codes:
        """As the quantizer does."""
        return self.quantizer.quantize(weight, grid, hessian)

    def plan(self, walk: Walk, report: Report = quiet) -> BitPlan:
        """Widths for the experts as allocated, the quantizer's own for all other matrices."""
        matrices = walk.matrices()
        experts = [matrix for matrix in matrices if matrix.expert]
        name = type(self).__name__.lower()
        if not experts:
            raise StropError(
                f"{name} spends bits on the experts of a mixture of experts, and a "
                f"{type(walk.model).__name__} has none: use rtn or gptq"
            )
        require_fit(experts, [*self.grids.values()])
        require_fit(matrices, [self.quantizer.grid])
        rules = Rules(self.grids, self.bits, self.weighting, self.noise, self.solver, self.granularity)
        found = self.allocate(walk, experts, rules, report)
        chosen = {row.name: row for row in found.rows}
        rows = tuple(chosen.get(matrix.name) or row(matrix, self.quantizer.grid) for matrix in matrices)
        return dataclasses.replace(found, rows=rows, method=name)


@dataclass(frozen=True)
class AlphaQ(Allocated):
    """Bits by spectral exponent."""

    gamma: float | None = None
    """The exponent of sensitivity; None chooses it by `ratio`, and 0 where alpha carries no signal."""
    ratio: float = 8.0
    """What percentiles 5 and 95 of sensitivity differ by, without a gamma."""
    tile: int | None = None
    """Size of the tiles of FARMS; None takes 128, or less where matrices are too small for 8 of them."""
    k_frac: float = 0.1
    """Share of the eigenvalues that is the tail."""
    seed: int = 0
    """Which tiles are drawn from a matrix that has more than 256."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is not None and not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma must be 0 or more, got {self.gamma}")
        if not 1 < self.ratio < math.inf:
            raise ValueError(f"ratio must be above 1, got {self.ratio}")
        if not 0 < self.k_frac < 1 or (self.tile is not None and self.tile < 2):
            raise ValueError(
                f"k_frac lies within (0, 1) and tiles are 2 or larger, got {self.k_frac}, {self.tile}"
            )

    def allocate(
        self, walk: Walk, experts: Sequence[Matrix], rules: Rules, report: Report = quiet
    ) -> BitPlan:
        """Read every matrix once: its spectrum, its variance, and what rounding costs it."""
        tile = self.tile or tile_for([matrix.shape for matrix in experts])
        stats = []
        for done, matrix in enumerate(experts):
            stats.append(measure(matrix, rules.grids, tile, self.k_frac, self.seed))
            report("reading spectra", (done + 1) / len(experts))
        return dataclasses.replace(allocate(stats, rules, self.gamma, self.ratio), tile=tile)


@torch.no_grad()
def measure(
    matrix: Matrix, grids: dict[int, Grid], tile: int | None, k_frac: float = 0.1, seed: int = 0
) -> Stat:
    """What an allocator needs to know of a matrix; without a `tile` its spectrum stays unread.

    Raises StropError for numbers that are none. A matrix of zeros has no spectrum and costs nothing.
    """
    weight = matrix.read()
    require_finite(matrix.name, weight)
    wide = weight.float()
    noise = {
        bits: float((restored(round_to_nearest(weight, grid), grid).float() - wide).square().mean())
        for bits, grid in grids.items()
    }
    alpha = spectrum(weight, tile, k_frac, seed) if tile else None
    return Stat(matrix, alpha, float(wide.var()), float(wide.square().mean()), noise)


def spectrum(weight: Tensor, tile: int, k_frac: float = 0.1, seed: int = 0) -> AlphaStat | None:
    """The exponent, or None for a matrix that has none."""
    try:
        return spectral_alpha(weight, tile, k_frac, seed)
    except StropError:
        return None
