"""Bits for every matrix under one average: what each costs at each width, and the widths that cost least.

AlphaQ's programme (arXiv 2606.04980): minimise sum_l s_l N_l(b_l) so that the average width stays within the
budget. Differs from the paper: sizes count in budget and cost, noise may be measured instead of modelled, and
gamma follows from the spread of alpha.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from strop.core.budget import greedy, milp
from strop.core.errors import StropError
from strop.weights.base import row
from strop.weights.grid import Grid
from strop.weights.plan import BitPlan
from strop.weights.spectrum import AlphaStat, auto_gamma, sensitivity, signal
from strop.weights.walk import Matrix

SOLVERS = {"greedy": greedy, "milp": milp}
NOISES = ("measured", "theory")
WEIGHTINGS = ("params", "matrices")
GRANULARITIES = ("matrix", "expert", "layer")


class Stat(NamedTuple):
    """What an allocator knows of one matrix."""

    matrix: Matrix
    alpha: AlphaStat | None
    """Its spectral exponent; None where it has none, or nobody looked."""
    variance: float
    """Var(W)."""
    power: float
    """Mean of W^2."""
    noise: dict[int, float]
    """Mean squared error of rounding to each width."""


class Rules(NamedTuple):
    """How bits are spent."""

    grids: dict[int, Grid]
    """Candidates by width."""
    budget: float
    """Most bits a weight on average."""
    weighting: str = "params"
    """Whether budget and cost count weights, or matrices alike."""
    noise: str = "measured"
    """What rounding costs: as measured, or Var(W) 2^-2b."""
    solver: str = "greedy"
    granularity: str = "matrix"
    """Who shares a width: nobody, the matrices of an expert, or all experts of a layer."""


def allocate(stats: Sequence[Stat], rules: Rules, gamma: float | None = None, ratio: float = 8.0) -> BitPlan:
    """AlphaQ's plan: sensitivity s_l = (median alpha / alpha_l)^gamma, on top of the noise.

    Without a `gamma` it is chosen so that percentiles 5 and 95 of s differ by `ratio`; where matrices do not
    differ by more than their alphas err it is 0, and the plan says so. Raises StropError for a budget below
    the smallest width.
    """
    known = [stat.alpha for stat in stats if stat.alpha is not None]
    found = signal(known) if known else None
    asked = gamma is not None
    if gamma is None:
        gamma = auto_gamma([stat.alpha for stat in known], ratio) if found and found.present else 0.0
    said = found.said if found else "No matrix has a spectrum"
    if asked:
        said += f"; gamma = {gamma:.3g} as asked for"
    elif gamma:
        said += f"; gamma = {gamma:.3g}, so that sensitivities differ by {ratio:g}"
    else:
        said += "; gamma = 0, so noise alone decides"
    return spend(stats, scores(stats, gamma), rules, said, gamma, found.present if found else False)


def scores(stats: Sequence[Stat], gamma: float) -> np.ndarray:
    """s_l `[L]`; 1 for a matrix without a spectrum."""
    known = [stat.alpha is not None for stat in stats]
    out = np.ones(len(stats))
    if gamma and any(known):
        out[known] = sensitivity([stat.alpha.alpha for stat in stats if stat.alpha is not None], gamma)
    return out


def spend(
    stats: Sequence[Stat],
    sensitivities: np.ndarray,
    rules: Rules,
    said: str,
    gamma: float | None = None,
    present: bool | None = None,
) -> BitPlan:
    """The plan of least cost for any sensitivities `[L]`. Raises StropError for too small a budget."""
    widths = list(rules.grids)
    if rules.budget < min(widths):
        raise StropError(
            f"a budget of {rules.budget:g} bits is below the smallest width of {min(widths)}: raise it, or "
            "allow smaller widths"
        )
    cost, size = costs(stats, sensitivities, rules)
    limit = rules.budget * size[:, 0].sum() / widths[0]
    members = groups([stat.matrix for stat in stats], rules.granularity)
    chosen = _solve(cost, size, members, limit, rules.solver)
    reached = _total(cost, chosen)
    if rules.granularity != "matrix":
        finest = _total(cost, _solve(cost, size, np.arange(len(stats)), limit, rules.solver))
        times = f"{reached / finest if finest else 1:.3g} times the noise of one per matrix"
        said += f"; one width per {rules.granularity} costs {times}"
    return plan_of(
        stats, rules, chosen, sensitivities, said=said, objective=reached, gamma=gamma, signal=present
    )


def plan_of(
    stats: Sequence[Stat], rules: Rules, chosen: np.ndarray, sensitivities: np.ndarray, **head: Any
) -> BitPlan:
    """The plan that gives each matrix its `chosen` candidate `[L]`, a column of `rules.grids`."""
    widths = list(rules.grids)
    rows = tuple(
        row(
            stat.matrix,
            rules.grids[widths[column]],
            alpha=stat.alpha.alpha if stat.alpha else None,
            alpha_se=stat.alpha.se if stat.alpha else None,
            variance=stat.variance,
            sensitivity=float(s),
            predicted=_noise(stat, widths[column], rules.noise) / stat.power if stat.power else 0.0,
        )
        for stat, s, column in zip(stats, sensitivities, chosen, strict=True)
    )
    return BitPlan(rows=rows, method="", budget=rules.budget, **head)


def costs(stats: Sequence[Stat], sensitivities: np.ndarray, rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    """Cost and size `[L, B]` of every matrix at every width."""
    weights = np.array([np.prod(stat.matrix.shape) if rules.weighting == "params" else 1 for stat in stats])
    noise = np.array([[_noise(stat, width, rules.noise) for width in rules.grids] for stat in stats])
    return sensitivities[:, None] * noise * weights[:, None], np.outer(weights, list(rules.grids)).astype(
        float
    )


def groups(matrices: Sequence[Matrix], granularity: str) -> np.ndarray:
    """Which matrices share a width: a number for each `[L]`."""
    if granularity == "matrix":
        return np.arange(len(matrices))
    parts = {"expert": 1, "layer": 2}[granularity]
    names = [matrix.name.rsplit(".", parts)[0] for matrix in matrices]
    return np.unique(names, return_inverse=True)[1]


def _solve(cost: np.ndarray, size: np.ndarray, members: np.ndarray, limit: float, solver: str) -> np.ndarray:
    """The chosen column of each matrix `[L]`, the same within a group."""
    shape = (members.max() + 1, cost.shape[1])
    together, sizes = np.zeros(shape), np.zeros(shape)
    np.add.at(together, members, cost)
    np.add.at(sizes, members, size)
    return SOLVERS[solver](together, sizes, limit)[members]


def _noise(stat: Stat, width: int, noise: str) -> float:
    return stat.noise[width] if noise == "measured" else stat.variance * 4.0**-width


def _total(cost: np.ndarray, chosen: np.ndarray) -> float:
    return float(np.take_along_axis(cost, chosen[:, None], 1).sum())
