"""How the tables of claims about pruning are read: differences in points, with intervals over halvings.

Two halvings of the same images have half of their images in common, so that five of them tell less than five
independent ones would. The variance of their mean is widened for it as Nadeau and Bengio (2003) do.
"""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from strop.claims.base import Table, graded
from strop.claims.prune_bed import Scale

DENSE = "dense"
LEAST = 1e-9
"""What a ratio is of where there is nothing."""


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    ends: tuple[float, float]


class Found(NamedTuple):
    """A measure of every model, and its mean over models."""

    whole: Estimate
    each: dict[str, Estimate]
    splits: list[float]
    """The mean over models, a split each."""

    @property
    def means(self) -> list[float]:
        """By model."""
        return [one.mean for one in self.each.values()]

    def told(self, form: str = "{:.1f}") -> str:
        """The mean, then every model with its interval."""
        each = ", ".join(
            f"{name} {form.format(one.mean)} [{form.format(one.ends[0])}, {form.format(one.ends[1])}]"
            for name, one in self.each.items()
        )
        return f"{form.format(self.whole.mean)} ({each})"


def halved(values: np.ndarray) -> Estimate:
    """Mean of `values` `[splits]`, and its interval where each is of other halves of the same images."""
    count, mean = len(values), float(values.mean())
    reach = float(stdtrit(count - 1, 0.975) * values.std(ddof=1) * sqrt(1 / count + 1))
    return Estimate(mean, (mean - reach, mean + reach))


def over(models: Sequence[str], values: Callable[[str], np.ndarray]) -> Found:
    """What `values` has of each model `[splits]`: the models share their halves."""
    found = {model: values(model) for model in models}
    mean = np.mean([*found.values()], axis=0)
    return Found(halved(mean), {name: halved(one) for name, one in found.items()}, mean.tolist())


def of(table: Table, measure: str, **wanted: Any) -> np.ndarray:
    """A measure in percent or points, `[splits]`, as the mean over rows, which are draws."""
    return 100 * np.mean([row[measure] for row in table.where(**wanted)], axis=0)


def mean_of(table: Table, models: Sequence[str], measure: str, **wanted: Any) -> Found:
    """A measure in percent or points."""
    return over(models, lambda name: of(table, measure, model=name, **wanted))


def gap(table: Table, models: Sequence[str], measure: str, one: str, other: str) -> Found:
    """How much more of a measure, in percent or points, one method has than another."""
    return over(
        models,
        lambda name: (
            of(table, measure, model=name, method=one) - of(table, measure, model=name, method=other)
        ),
    )


def quotient(table: Table, models: Sequence[str], measure: str, one: str, other: str) -> Found:
    """A measure of one method over that of another."""

    def ratio(name: str) -> np.ndarray:
        under = of(table, measure, model=name, method=other)
        return of(table, measure, model=name, method=one) / np.maximum(under, LEAST)

    return over(models, ratio)


def lost(table: Table, models: Sequence[str], method: str, half: str = "test") -> Found:
    """Points of accuracy below the dense model's."""
    return gap(table, models, half, DENSE, method)


def above(found: Found, least: float) -> str:
    """The verdict on a measure that is to lie above a bound."""
    each = [one.ends[0] > least for one in found.each.values()]
    return graded(each, [all(value > least for value in found.splits)])


ABOVE = (
    "reproduced where it is so of each model, whole intervals, partly where of their mean in every halving"
)
"""What `above` does."""


def common(scale: Scale, models: Sequence[str], paper: str) -> dict[str, Any]:
    """The fields that claims about these models share."""
    varied = f"halves of 600 images to plan by and to judge by; on each of {len(models)} trained models"
    return {
        "paper": paper,
        "scale": scale.name,
        "seeds": len(models) * scale.splits,
        "varied": varied,
    }
