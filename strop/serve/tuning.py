"""Weights of `cache-load` for a workload: a grid search on a slice of its trace that is not measured later.

NetKV (arXiv 2606.03910) compares with weights tuned for each workload, "CLA*". Only their ratio matters, so
the grid has one dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan

from strop.core.errors import StropError
from strop.serve.base import RoutingPolicy, Trace
from strop.serve.routing.cache_load import CacheLoad
from strop.serve.traces import split

GRID = tuple(step / 10 for step in range(11))
"""Shares of load in the weights, from the cache alone to load alone."""


@dataclass(frozen=True)
class Tuned:
    """What a search found."""

    policy: CacheLoad
    rows: list[tuple[CacheLoad, float]]
    """Each candidate and its cost, in order of the grid."""
    rest: Trace
    """What to measure it on: the jobs that the search has not seen."""


def tune(
    evaluate: Callable[[RoutingPolicy, Trace], float],
    trace: Trace,
    share: float = 0.2,
    grid: Sequence[float] = GRID,
) -> Tuned:
    """The weights of the lowest cost on the first `share` of a trace; of equals the first of the grid.

    `evaluate(policy, trace)`: a cost such as mean TTFT. Raises StropError where it is not a number.
    """
    held_out, rest = split(trace, share)
    rows = [
        (policy, evaluate(policy, held_out)) for policy in (CacheLoad(w_c=1 - w_l, w_l=w_l) for w_l in grid)
    ]
    if any(isnan(cost) for _, cost in rows):
        raise StropError(f"the first {share:.0%} of {trace.name} gives no cost: take a larger share")
    return Tuned(min(rows, key=lambda row: row[1])[0], rows, rest)
