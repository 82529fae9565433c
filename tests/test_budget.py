"""Choices under a budget: both solvers against brute force, and the quick one against the exact one."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.core import budget
from strop.core.budget import greedy, milp
from strop.core.errors import StropError

both = pytest.mark.parametrize("solve", [greedy, milp])


def total(table: np.ndarray, chosen: np.ndarray) -> float:
    return float(np.take_along_axis(np.asarray(table, float), chosen[:, None], 1).sum())


def least(cost: np.ndarray, size: np.ndarray, limit: float) -> float:
    """The least total cost of all choices that fit."""
    choices = itertools.product(range(cost.shape[1]), repeat=len(cost))
    return min(total(cost, np.array(each)) for each in choices if total(size, np.array(each)) <= limit)


def convex(rows: int, seed: int, mixed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Costs that fall by a factor of four a column, in rows of equal or of mixed sizes."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1_000, 3_000_000, rows) if mixed else np.full(rows, 1_572_864)
    widths = np.array([1, 2, 3, 4])
    scale = np.exp(rng.normal(0, 1, rows)) * weights
    return 1e-9 * scale[:, None] * 4.0**-widths, weights[:, None] * widths


@st.composite
def problems(draw):
    """Any costs, falling or not, with sizes in whole numbers, and a budget that the smallest fit."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cost = rng.normal(0, 10.0 ** draw(st.integers(-9, 3)), (rows, columns))
    size = rng.integers(0, draw(st.sampled_from([4, 1_000_000])), (rows, columns))
    floor, top = size.min(1).sum(), size.max(1).sum()
    return cost, size, float(floor + draw(st.floats(0, 1)) * (top - floor))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_exact_solver_equals_brute_force(problem):
    cost, size, limit = problem
    chosen = milp(cost, size, limit)
    assert total(size, chosen) <= limit
    spread = np.ptp(cost, axis=1).sum()
    assert total(cost, chosen) <= least(cost, size, limit) + 1e-5 * spread


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_quick_solver_fits_and_leaves_nothing_to_improve(problem):
    cost, size, limit = problem
    chosen = greedy(cost, size, limit)
    rest = limit - total(size, chosen)
    assert rest >= 0
    assert total(cost, chosen) >= least(cost, size, limit) - 1e-9 * np.ptp(cost, axis=1).sum()
    for row, here in enumerate(chosen):
        better = (cost[row] < cost[row, here]) & (size[row] - size[row, here] <= rest)
        assert not better.any()


@settings(max_examples=200, deadline=None)
@given(problems())
def test_the_quick_solver_is_within_one_step_of_the_least(problem):
    cost, size, limit = problem
    worst_step = (cost.max(1) - cost.min(1)).max()
    assert total(cost, greedy(cost, size, limit)) <= least(cost, size, limit) + worst_step * (1 + 1e-9)


@pytest.mark.parametrize("width", [1.25, 2.5, 3.3])
@pytest.mark.parametrize("rows", [96, 768])
@pytest.mark.parametrize(("mixed", "worst"), [(False, 1.001), (True, 1.01)])
def test_the_quick_solver_is_nearly_exact_on_convex_costs(rows: int, mixed: bool, worst: float, width: float):
    cost, size = convex(rows, seed=rows, mixed=mixed)
    limit = width * size[:, 0].sum()
    quick, exact = greedy(cost, size, limit), milp(cost, size, limit)
    assert max(total(size, quick), total(size, exact)) <= limit
    assert total(cost, exact) <= total(cost, quick) * (1 + 1e-6)
    assert total(cost, quick) <= worst * total(cost, exact)


@both
def test_a_column_above_the_hull_is_passed_over(solve):
    cost = np.array([[10.0, 9.9, 0.0], [10.0, 4.0, 3.9]])
    size = np.array([[1, 2, 3], [1, 2, 3]])
    assert solve(cost, size, 5).tolist() == [2, 1]


@both
def test_the_rest_is_spent_on_a_column_above_the_hull(solve):
    cost = np.array([[10.0, 9.0, 0.0]])
    size = np.array([[1, 2, 4]])
    assert solve(cost, size, 3).tolist() == [1]


@both
def test_larger_is_not_chosen_where_it_is_not_better(solve):
    cost = np.array([[1.0, 2.0, 0.5, 0.6], [0.0, 1.0, 2.0, 3.0]])
    size = np.array([[1, 2, 3, 4], [2, 1, 2, 2]])
    assert solve(cost, size, 100).tolist() == [2, 0]


@both
def test_columns_need_no_order(solve):
    cost, size = convex(12, seed=4, mixed=True)
    limit = 2.5 * size[:, 0].sum()
    order = np.array([2, 0, 3, 1])
    assert total(cost[:, order], solve(cost[:, order], size[:, order], limit)) == pytest.approx(
        total(cost, solve(cost, size, limit))
    )


@both
def test_the_least_budget_is_enough_and_a_smaller_one_is_refused(solve):
    cost, size = convex(20, seed=2, mixed=True)
    floor = int(size[:, 0].sum())
    assert solve(cost, size, floor).tolist() == [0] * 20
    with pytest.raises(StropError, match=r"raise the budget"):
        solve(cost, size, floor - 1)


def test_every_column_is_taken_as_often_as_it_must():
    cost, size = convex(6, seed=7, mixed=False)
    limit, fewest = 2.5 * size[:, 0].sum(), np.array([0, 1, 1, 1])
    chosen = milp(cost, size, limit, fewest)
    allowed = [
        np.array(each)
        for each in itertools.product(range(4), repeat=6)
        if (np.bincount(each, minlength=4) >= fewest).all() and total(size, np.array(each)) <= limit
    ]
    best = min(total(cost, each) for each in allowed)
    assert total(cost, chosen) == pytest.approx(best, rel=1e-5)
    assert best > total(cost, milp(cost, size, limit)) * 1.001
    with pytest.raises(StropError, match="as often as it must"):
        milp(cost, size, limit, [0, 0, 0, 6])


@both
def test_the_tables_are_not_written_to(solve):
    cost, size = convex(8, seed=3, mixed=False)
    before = cost.copy(), size.copy()
    solve(cost, size, 2.5 * size[:, 0].sum())
    assert np.array_equal(cost, before[0])
    assert np.array_equal(size, before[1])


def test_the_quick_solver_takes_ten_thousand_rows_in_a_second():
    cost, size = convex(10_000, seed=5, mixed=True)
    limit = 2.5 * size[:, 0].sum()
    start = time.process_time()
    chosen = greedy(cost, size, limit)
    assert time.process_time() - start < 1
    assert 0.9999 * limit < total(size, chosen) <= limit


def test_an_exact_solver_that_gives_up_says_so(monkeypatch):
    monkeypatch.setattr(budget, "TIME_LIMIT", 0.0)
    cost, size = convex(200, seed=6, mixed=True)
    with pytest.raises(StropError, match="use the greedy one"):
        milp(cost, size, 2.5 * size[:, 0].sum())


@both
@pytest.mark.parametrize(
    ("cost", "size"),
    [
        (np.ones(3), np.ones(3)),
        (np.ones((2, 3)), np.ones((2, 2))),
        (np.ones((0, 3)), np.ones((0, 3))),
        (np.full((2, 2), np.nan), np.ones((2, 2))),
        (np.ones((2, 2)), np.full((2, 2), np.inf)),
        (np.ones((2, 2)), -np.ones((2, 2))),
    ],
)
def test_a_wrong_table_is_a_value_error(solve, cost: np.ndarray, size: np.ndarray):
    with pytest.raises(ValueError):
        solve(cost, size, 10.0)
