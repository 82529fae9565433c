"""Plans on every half of the images, and other ways to save as much: a row a method, one value a split."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from strop.claims.base import Progress, Row
from strop.claims.prune_bed import Split, Subject
from strop.claims.prune_reading import DENSE
from strop.prune.base import PruneMethod
from strop.prune.baselines import GlobalRanking, Uniform, magnitude_masked
from strop.prune.plan import PrunePlan

ALL, BLOCKS, RANDOM, RANKING, RANKED_BLOCKS, MASKS = (
    "one rate for all",
    "one rate for blocks",
    "channels by lot",
    "one ranking of all channels",
    "one ranking in blocks",
    "masks of weights",
)
MIDDLE = 0.6
"""The rate at which the damage of units is told."""
MOST = 0.999
"""The rate beyond which units cannot be cut: where a plan saves still more, this is what is beside it."""
EXACT = 1e-9

Way = Callable[[Subject, PrunePlan], nn.Module]
"""From a plan to another model that saves as much."""


def row_of(head: Row, found: Sequence[Row]) -> Row:
    """What was found on each split, as lists."""
    return head | {key: [one[key] for one in found] for key in found[0]}


def dense_row(one: Subject, splits: Sequence[Split]) -> Row:
    """The model as it is."""
    return row_of({"model": one.name, "method": DENSE}, [one.judged(one.model, split) for split in splits])


def thinned(one: Subject, method: PruneMethod) -> nn.Module:
    """The model cut by a method that asks for no accuracy."""
    return method.plan_units(one.units, one.model).apply(one.model, one.units)


def planned(one: Subject, splits: Sequence[Split], method: PruneMethod) -> list[PrunePlan]:
    """A plan for each split."""
    return [method.plan_units(one.units, one.model, one.answers.on(split.plan)) for split in splits]


def plan_row(
    one: Subject, splits: Sequence[Split], name: str, plans: Sequence[PrunePlan], allowed: float
) -> Row:
    """What plans save and lose, once cut.

    Raises RuntimeError where a plan says other than its tensors or its half of the images do, or where it
    loses more than is `allowed` there.
    """
    found = []
    for split, plan in zip(splits, plans, strict=True):
        thin = plan.apply(one.model, one.units)
        judged, saving = one.judged(thin, split), one.saved(thin)
        if abs(saving - plan.saving) > EXACT or judged["val"] != plan.accuracy:
            raise RuntimeError(f"control failed: {name} of {one.name} is not what its plan says")
        if plan.dense_accuracy - plan.accuracy > allowed + EXACT:
            raise RuntimeError(f"control failed: {name} of {one.name} loses more than it may")
        told = {"evaluations": plan.evaluations, "feasible": plan.feasible, "kept": kept(plan)}
        found.append(judged | {"saving": saving, "spent": spent(plan, allowed)} | told)
    return row_of({"model": one.name, "method": name}, found)


def kept(plan: PrunePlan) -> str:
    """The share of channels that stay, of units that lose some."""
    thinner = (row for row in plan.rows if row.kept < row.width)
    return ", ".join(f"{row.name} {row.kept / row.width:.0%}" for row in thinner)


def spent(plan: PrunePlan, allowed: float) -> float:
    """The share of the tolerance that the first unit of the walk took."""
    accepted = [one for one in plan.walk if one.accepted]
    first = [one for one in accepted if one.what == accepted[0].what]
    return (plan.dense_accuracy - first[-1].accuracy) / allowed if first else 0.0


def ways(draws: int) -> dict[str, list[Way]]:
    """Other ways to save as much as a plan, and their draws."""

    def reachable(one: Subject, plan: PrunePlan, where: str) -> float:
        return min(plan.saving, Uniform(rate=MOST, where=where).plan_units(one.units, one.model).saving)

    def uniform(where: str) -> Way:
        def found(one: Subject, plan: PrunePlan) -> nn.Module:
            saving = reachable(one, plan, where)
            return thinned(one, Uniform(where=where).matching(saving, one.units, one.model))

        return found

    def ranking(where: str) -> Way:
        return lambda one, plan: thinned(one, GlobalRanking(saving=reachable(one, plan, where), where=where))

    def by_lot(seed: int) -> Way:
        return lambda one, plan: replace(plan, score="random", seed=seed).apply(one.model, one.units)

    return {
        ALL: [uniform("all")],
        BLOCKS: [uniform("blocks")],
        RANDOM: [by_lot(seed) for seed in range(draws)],
        RANKING: [ranking("all")],
        RANKED_BLOCKS: [ranking("blocks")],
        MASKS: [lambda one, plan: magnitude_masked(one.model, plan.saving)],
    }


def beside(
    one: Subject,
    splits: Sequence[Split],
    plans: Sequence[PrunePlan],
    others: Mapping[str, Sequence[Way]],
    progress: Progress,
) -> list[Row]:
    """Each of the other ways at the saving of each plan: a row a draw. It announces every way."""
    rows = []
    for name, draws in others.items():
        progress(f"{name}, {one.name}")
        for draw, way in enumerate(draws):
            found = []
            for split, plan in zip(splits, plans, strict=True):
                model = way(one, plan)
                found.append(one.judged(model, split) | {"saving": one.saved(model), "matched": plan.saving})
            rows.append(row_of({"model": one.name, "method": name, "draw": draw}, found))
    return rows


def unit_rows(one: Subject, plans: Sequence[PrunePlan]) -> list[Row]:
    """A row a unit that was cut alone: its size, and what a rate of `MIDDLE` costs on each split."""
    rows = []
    for row in plans[0].rows:
        tries = [[t for t in plan.sensitivity if t.what == row.name and t.rate == MIDDLE] for plan in plans]
        if not tries[0]:
            continue
        losses = [plan.dense_accuracy - tried.accuracy for plan, (tried,) in zip(plans, tries, strict=True)]
        size = {"parameters": row.parameters, "share": row.parameters / plans[0].parameters}
        verdicts = [{r.name: r.verdict for r in plan.rows}[row.name] for plan in plans]
        rows.append({"model": one.name, "unit": row.name, **size, "lost": losses, "verdict": verdicts})
    return rows
