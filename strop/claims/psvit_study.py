"""PSViT's plans, uniform rates with channels by norm and by lot, and what recovery gives back."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from strop.claims.base import Part, Progress, Row, Tables, measured, part
from strop.claims.prune_bed import BATCH, Bed, Scale, Split, Subject
from strop.claims.prune_reading import DENSE
from strop.claims.prune_study import (
    ALL,
    BLOCKS,
    beside,
    dense_row,
    plan_row,
    planned,
    row_of,
    thinned,
    unit_rows,
    ways,
)
from strop.prune.baselines import Uniform
from strop.prune.plan import PrunePlan, fingerprint
from strop.prune.psvit import PSViT
from strop.prune.recover import finetune, reestimate

PSVIT = "PSViT"
TOLERANCE = 0.03
"""What plans may lose, as in the paper."""
RATES = (0.1, 0.25, 0.5)
PLACES = {ALL: "all", BLOCKS: "blocks"}
NORM, LOT = "by norm", "by lot"
COLLAPSING = 0.5
"""The rate for all units from which a model collapses."""
COLLAPSED = "collapsed"
BEFORE, NORMS, TUNED = STEPS = "as it was", "norms measured anew", "fine-tuned"
STATES = DENSE, COLLAPSED, PSVIT
"""What recovers."""
RATE = 1e-3
"""Of fine-tuning: a quarter of training's."""
Step = Callable[[nn.Module], nn.Module]


def plan_study(one: Subject, bed: Bed, scale: Scale, known: list[PrunePlan], progress: Progress) -> list[Row]:
    """PSViT on each split, left in `known` for the next experiment, and other ways to save as much."""
    progress(f"planning, {one.name}")
    known += planned(one, bed.splits, PSViT(tolerance=TOLERANCE))
    rows = [dense_row(one, bed.splits), plan_row(one, bed.splits, PSVIT, known, TOLERANCE)]
    return rows + beside(one, bed.splits, known, ways(scale.draws), progress)


def uniform_study(bed: Bed, progress: Progress, scale: Scale, name: str) -> list[Row]:
    """One rate for units in blocks, or for all, with the channels that norms choose and with others."""
    one = bed.subjects[name]
    rows = [dense_row(one, bed.splits)]
    lots = [("random", seed) for seed in range(scale.draws)]
    for place, where in PLACES.items():
        for rate in RATES:
            progress(f"a rate of {rate:g}, {place}, {name}")
            for channels, scores in ((NORM, [("l2", 0)]), (LOT, lots)):
                head = {"model": name, "method": place, "rate": rate, "channels": channels}
                for score, seed in scores:
                    thin = thinned(one, Uniform(rate=rate, where=where, score=score, seed=seed))
                    rows.append(
                        judged(head | {"saving": one.saved(thin), "draw": seed}, one, bed.splits, thin)
                    )
    return rows


def judged(head: Row, one: Subject, splits: Sequence[Split], *models: nn.Module) -> Row:
    """A model on every split, or one model a split."""
    each = models if len(models) > 1 else models * len(splits)
    return row_of(head, [one.judged(model, split) for model, split in zip(each, splits, strict=True)])


def recovery_study(
    one: Subject, bed: Bed, scale: Scale, known: Sequence[PrunePlan], progress: Progress
) -> list[Row]:
    """Batch norms measured anew and fine-tuning, of PSViT's plans, a collapsed model, and the dense one."""
    states: dict[str, list[nn.Module]] = {
        DENSE: [one.model],
        COLLAPSED: [thinned(one, Uniform(rate=COLLAPSING, where="all"))],
        PSVIT: [plan.apply(one.model, one.units) for plan in known],
    }
    batches = bed.batches()
    images = [*bed.training.images[: scale.statistics].split(BATCH)]
    steps: dict[str, Step] = {
        BEFORE: lambda model: model,
        NORMS: remembering(lambda model: reestimate(model, images)),
        TUNED: remembering(lambda model: finetune(model, batches, loss, RATE, 1)),
    }
    rows = []
    for step, taken in steps.items():
        for state, models in states.items():
            progress(f"{state}, {step}, {one.name}")
            head = {"model": one.name, "method": state, "step": step}
            rows.append(judged(head, one, bed.splits, *(taken(model) for model in models)))
    return rows


def remembering(step: Step) -> Step:
    """The same for models that are equal number by number."""
    known: dict[str, nn.Module] = {}

    def taken(model: nn.Module) -> nn.Module:
        key = fingerprint(model)
        if key not in known:
            known[key] = step(model)
        return known[key]

    return taken


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """As in training: half of the mean over steps, half of every step alone."""
    images, labels = batch
    logits = model.logits(images)
    each = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))
    return 0.5 * each + 0.5 * F.cross_entropy(logits.mean(0), labels)


def studies(bed: Bed, progress: Progress, scale: Scale, name: str) -> Tables:
    """The experiments on a model of recordings that need its plans."""
    one, known = bed.subjects[name], list[PrunePlan]()
    tables = measured("plans", lambda: plan_study(one, bed, scale, known, progress))
    tables |= measured("units", lambda: unit_rows(one, known))
    return tables | measured("recovery", lambda: recovery_study(one, bed, scale, known, progress))


def parts(scale: Scale) -> list[Part]:
    """The experiments."""
    steps = 1 + len(ways(scale.draws)) + len(STATES) * len(STEPS)
    every = (*scale.events, *scale.digits)
    rates = len(PLACES) * len(RATES)
    return [
        *(Part(f"plans, {n}", steps, partial(studies, scale=scale, name=n)) for n in scale.events),
        *(part("uniform", n, rates, partial(uniform_study, scale=scale, name=n)) for n in every),
    ]
