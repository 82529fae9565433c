"""Choose one column a row so that the total cost is least and the total size stays within a budget.

The multiple-choice knapsack. `greedy` takes the steps that save most cost a unit of size, which solves the
linear relaxation; `milp` is exact. Left out: dynamic programming, whose table grows with the budget.
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array, eye_array, kron

from strop.core.errors import StropError

TIME_LIMIT = 120.0
"""Seconds that the exact solver may take."""
GAP = 1e-6
"""Relative distance to the proven bound at which it may stop."""
INFEASIBLE = 2
"""The status by which SciPy says so."""


def greedy(cost: np.ndarray, size: np.ndarray, budget: float) -> np.ndarray:
    """Chosen columns `[L]` for `cost` and `size` `[L, B]`, whose sizes sum to at most `budget`.

    Walks down the lower convex hull of each row, the steepest step of all rows first, then spends the rest on
    single improvements. The cost exceeds the least by no more than the first step that did not fit would
    have saved. Raises StropError if the smallest choices exceed the budget.
    """
    cost, size, chosen = _checked(cost, size, budget)
    rest = budget - _total(size, chosen)
    hulls = [_hull(costs, sizes, int(start)) for costs, sizes, start in zip(cost, size, chosen, strict=True)]

    def step(row: int) -> tuple[float, int]:
        """The slope of the row's next step along its hull."""
        here, there = chosen[row], hulls[row][-1]
        return (cost[row, there] - cost[row, here]) / (size[row, there] - size[row, here]), row

    heap = [step(row) for row, hull in enumerate(hulls) if hull]
    heapq.heapify(heap)
    while heap:
        _, row = heapq.heappop(heap)
        there = hulls[row].pop()
        extra = size[row, there] - size[row, chosen[row]]
        if extra <= rest:
            rest -= extra
            chosen[row] = there
            if hulls[row]:
                heapq.heappush(heap, step(row))
    return _filled(cost, size, chosen, rest)


def milp(cost: np.ndarray, size: np.ndarray, budget: float, least: Sequence[int] = ()) -> np.ndarray:
    """Chosen columns `[L]` of least total cost for `cost` and `size` `[L, B]`, by HiGHS.

    `least` `[B]` says how many rows must choose each column at least. Proven to a relative gap of 1e-6.
    Raises StropError if the budget is too small for any choice, or if no optimum is proven in two minutes.
    """
    cost, size, _ = _checked(cost, size, budget)
    rows, columns = cost.shape
    excess = cost - cost.min(1, keepdims=True)
    unit_cost, unit_size = excess.max() or 1.0, size.max() or 1.0
    every_row = LinearConstraint(kron(eye_array(rows), np.ones((1, columns)), format="csr"), 1, 1)
    within = LinearConstraint(csr_array(size.reshape(1, -1) / unit_size), -np.inf, budget / unit_size)
    constraints = [every_row, within]
    if any(least):
        constraints.append(
            LinearConstraint(kron(np.ones((1, rows)), eye_array(columns), "csr"), least, np.inf)
        )
    found = optimize.milp(
        excess.ravel() / unit_cost,
        integrality=np.ones(cost.size),
        bounds=(0, 1),
        constraints=constraints,
        options={"time_limit": TIME_LIMIT, "mip_rel_gap": GAP},
    )
    if found.status == INFEASIBLE:
        raise StropError(
            f"no choice within a budget of {budget:g} takes each column as often as it must: raise the budget"
        )
    if not found.success:
        raise StropError(f"the exact solver gave up ({found.message.rstrip('. ')}): use the greedy one")
    chosen = found.x.reshape(cost.shape).argmax(1)
    if _total(size, chosen) > budget:
        raise StropError(
            f"the exact solver overran the budget of {budget:g} by rounding: use the greedy one, or a budget "
            "that is slightly smaller"
        )
    return chosen


def _checked(cost: np.ndarray, size: np.ndarray, budget: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both tables as float64, and the column of least size in each row, of those the one of least cost."""
    cost, size = np.asarray(cost, dtype=float), np.asarray(size, dtype=float)
    if cost.ndim != 2 or cost.shape != size.shape or not cost.size:
        raise ValueError(f"cost and size must be equal tables [L, B], got {cost.shape} and {size.shape}")
    if not (np.isfinite(cost).all() and np.isfinite(size).all() and np.isfinite(budget)):
        raise ValueError("cost, size and budget must be finite")
    if (size < 0).any():
        raise ValueError("size must not be negative")
    smallest = np.lexsort((cost, size))[:, 0]
    least = _total(size, smallest)
    if least > budget:
        raise StropError(
            f"a budget of {budget:g} is below {least:g}, the total of the smallest choices: raise the budget "
            "or offer smaller choices"
        )
    return cost, size, smallest


def _total(table: np.ndarray, chosen: np.ndarray) -> float:
    return math.fsum(np.take_along_axis(table, chosen[:, None], 1)[:, 0])


def _hull(cost: np.ndarray, size: np.ndarray, start: int) -> list[int]:
    """The columns of the lower convex hull of one row behind its `start`, the next one last."""
    hull = [start]
    for column in np.lexsort((cost, size)):
        if cost[column] >= cost[hull[-1]]:
            continue
        while len(hull) > 1 and _above(cost, size, hull[-2], hull[-1], column):
            hull.pop()
        hull.append(int(column))
    return hull[:0:-1]


def _above(cost: np.ndarray, size: np.ndarray, left: int, middle: int, right: int) -> bool:
    """Whether `middle` lies on or above the line from `left` to `right`."""
    saved = (cost[left] - cost[middle]) * (size[right] - size[left])
    return bool(saved <= (cost[left] - cost[right]) * (size[middle] - size[left]))


def _filled(cost: np.ndarray, size: np.ndarray, chosen: np.ndarray, rest: float) -> np.ndarray:
    """Move single rows to any better column that fits in `rest`, the largest gain first, until none does."""
    rows = np.arange(len(chosen))
    while True:
        gain = cost[rows, chosen][:, None] - cost
        extra = size - size[rows, chosen][:, None]
        row, column = np.nonzero((gain > 0) & (extra <= rest))
        if not row.size:
            return chosen
        moved = set()
        for at in np.argsort(-gain[row, column], kind="stable"):
            if row[at] not in moved and extra[row[at], column[at]] <= rest:
                moved.add(row[at])
                rest -= extra[row[at], column[at]]
                chosen[row[at]] = column[at]
