"""Intervals by drawing independent units again."""

import math
from collections.abc import Callable

import numpy as np

RESAMPLES = 2000


def bootstrap(
    units: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> tuple[float, float, float]:
    """Estimate and 95 % percentile interval of a statistic over independent units.

    `units` `[n, ...]`; `statistic` maps resamples `[m, n, ...]` to `[m]`. A single unit bounds nothing: its
    interval is infinite.
    """
    estimate = float(statistic(units[None])[0])
    if len(units) < 2:
        return estimate, -math.inf, math.inf
    picks = np.random.default_rng(seed).integers(0, len(units), (RESAMPLES, len(units)))
    low, high = np.percentile(statistic(units[picks]), [2.5, 97.5])
    return estimate, float(low), float(high)
