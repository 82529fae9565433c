"""Intervals of a mean over two things that vary at once, such as texts and draws of a method.

The crossed bootstrap: rows and columns are resampled independently, so that a difference which rests on a
few texts, or on a few draws, is seen to. Left out: weights, and tables with holes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from strop.claims.alphaq_bed import MAIN
from strop.claims.base import Row, Table
from strop.core.intervals import RESAMPLES


class Estimate(NamedTuple):
    """A value and its 95 % interval."""

    mean: float
    ends: tuple[float, float]


def crossed(values: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of `values` `[draws, texts]`, and the interval over both."""
    rng, (draws, texts) = np.random.default_rng(seed), values.shape
    rows = rng.integers(0, draws, (RESAMPLES, draws))
    columns = rng.integers(0, texts, (RESAMPLES, texts))
    means = values[rows[:, :, None], columns[:, None, :]].mean((1, 2))
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(float(values.mean()), (float(low), float(high)))


def told(found: Mapping[str, Estimate], form: str) -> str:
    """Named estimates with their intervals in one line."""
    return ", ".join(
        f"{name} {form.format(one.mean)} [{form.format(one.ends[0])}, {form.format(one.ends[1])}]"
        for name, one in found.items()
    )


def losses(table: Table, model: str, method: str, budget: float | None = MAIN, by: str = "rtn") -> np.ndarray:
    """Loss `[draws, texts]` of an allocation; one that has no draws has a single row."""
    return np.array(table.pick("loss", model=model, method=method, budget=budget, by=by))


def apart(
    table: Table, model: str, under: str, over: str, budget: float = MAIN, by: str = "rtn"
) -> np.ndarray:
    """Paired differences of loss `[draws, texts]`."""
    return losses(table, model, under, budget, by) - losses(table, model, over, budget, by)


def gaps(models: Sequence[str], table: Table, under: str, over: str, by: str = "rtn") -> dict[str, Estimate]:
    """How much less one allocation loses than another, by model."""
    return {model: crossed(apart(table, model, under, over, by=by)) for model in models}


def over_models(models: Sequence[str], table: Table, under: str, over: str, by: str = "rtn") -> Estimate:
    """The same, as the mean over models."""
    return crossed(np.mean([apart(table, model, under, over, by=by) for model in models], axis=0))


def summed(rows: Sequence[Row]) -> list[Row]:
    """Rows with their losses as the mean over texts, a value a draw."""
    return [row | {"loss": np.mean(row["loss"], axis=1).tolist()} for row in rows]
