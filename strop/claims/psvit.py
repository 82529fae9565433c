"""PSViT (arXiv 2606.03257): what the paper claims, and what plans for small spiking transformers say to it.

Each hypothesis reads the tables of `psvit_study`, applies thresholds named here, and becomes a `Claim`. The
first number of `measured` is the one that `interval` belongs to. The models read digits; nothing here says
what an ImageNet model would lose.
"""

import numpy as np

from strop.claims.base import Claim, Paper, Table, Tables, graded, listed, on_a_gpu
from strop.claims.prune_bed import LAYING, SCALES, Scale, lay
from strop.claims.prune_reading import ABOVE, DENSE, Found, above, common, gap, lost, mean_of, of, over
from strop.claims.prune_study import ALL, BLOCKS, MASKS, MIDDLE, RANDOM, RANKED_BLOCKS, RANKING
from strop.claims.psvit_study import (
    BEFORE,
    COLLAPSED,
    COLLAPSING,
    LOT,
    NORM,
    NORMS,
    PSVIT,
    RATES,
    TOLERANCE,
    TUNED,
    parts,
)

SAVES, LOSES = 20.0, 100 * TOLERANCE
"""Percent of the parameters, and points of accuracy, of the paper's headline."""
APART = 20.0
"""Points by which finer rates are ahead of one rate for all."""
MILD, HALF = 0.1, 0.5
"""Rates at which channels by norm and by lot are compared, and blocks of still images are cut."""
STILL_SAVES, STILL_LOSES = 30.0, 1.5
"""The same as the headline, of still images."""
ON_IMAGENET = {
    "psvit": "22.4% of the bytes of a spiking transformer go at 3 points on ImageNet",
    "primesvt": "26.68% of the bytes of a spiking transformer go at 3 points on ImageNet",
}
NOT_HERE = "neither ImageNet nor a checkpoint that was trained on it is at hand"
PAPER_VALUE = "unpruned 73.3%; 70.3% without and 72.8% with fine-tuning"


def verdicts(tables: Tables, scale: Scale) -> list[Claim]:
    """Every hypothesis against the tables."""
    plans, uniform, recovery = tables["plans"], tables["uniform"], tables["recovery"]
    return [
        saves(scale, plans, tables["units"]),
        ahead(
            scale, plans, ALL, APART, "finer rates follow from sensitivity; by how much they win is not told"
        ),
        ahead(scale, plans, BLOCKS, 0.0, "the abstract has uniform rates first and finer ones after"),
        ahead(scale, plans, RANKING, 0.0, "not compared"),
        ahead(scale, plans, RANKED_BLOCKS, 0.0, "not compared"),
        by_norm(scale, plans, uniform, ALL, MILD),
        by_norm(scale, plans, uniform, BLOCKS, HALF),
        masks(scale, plans),
        tuned(scale, recovery),
        norms(scale, recovery),
        still(scale, uniform),
        *on_a_gpu("psvit", scale.name, {ON_IMAGENET["psvit"]: PAPER_VALUE}, NOT_HERE),
    ]


def saves(scale: Scale, plans: Table, units: Table) -> Claim:
    """The headline."""
    saving = mean_of(plans, scale.events, "saving", method=PSVIT)
    test, val = (lost(plans, scale.events, PSVIT, half) for half in ("test", "val"))
    dense = mean_of(plans, scale.events, "test", method=DENSE)
    asked = [row["evaluations"] for row in plans.where(method=PSVIT)]
    within = [mean <= LOSES for mean in test.means]
    return plans.claim(
        [*plans.where(method=(DENSE, PSVIT)), *units.rows],
        claim=f"PSViT saves {SAVES:g}% of the bytes at {LOSES:g} points of accuracy",
        paper_value="22.4% at 3.0 points (ImageNet)",
        measured=f"saves, in percent, {saving.told()}; points lost on images that planning did not see "
        f"{test.told()}, on those that it did {val.told()}; dense accuracy {dense.told()}; evaluations "
        f"{np.mean(asked):.0f} ({np.min(asked)} to {np.max(asked)})",
        interval=saving.whole.ends,
        verdict=graded(
            [one.ends[0] >= SAVES for one in saving.each.values()] + within,
            [saving.whole.mean >= SAVES and test.whole.mean <= LOSES],
        ),
        reason="reproduced where each model saves as much, whole intervals, and loses no more in the mean on "
        "unseen images, partly where both are so of the mean over models; every parameter counts; on the "
        f"plan's own images {LOSES:g} points at most are lost by construction; points lost at a rate of "
        f"{MIDDLE:g}, one unit alone: {damages(units)}",
        **common(scale, scale.events, "psvit"),
    )


def damages(units: Table) -> str:
    """Mean points that units lose alone, by model."""
    found: dict[str, dict[str, float]] = {}
    for row in units.rows:
        found.setdefault(row["model"], {})[row["unit"]] = 100 * float(np.mean(row["lost"]))
    return "; ".join(f"{model} {listed(one, '{:.1f}')}" for model, one in found.items())


def ahead(scale: Scale, plans: Table, other: str, least: float, paper_value: str) -> Claim:
    """Accuracy of PSViT's plans above another way's at the same saving."""
    found = gap(plans, scale.events, "test", PSVIT, other)
    own, others = (lost(plans, scale.events, way).whole.mean for way in (PSVIT, other))
    more = np.mean([np.subtract(row["saving"], row["matched"]) for row in plans.where(method=other)])
    points = f"{least:g} points more" if least else "more"
    return plans.claim(
        plans.where(method=(DENSE, PSVIT, other)),
        claim=f"Rates by unit keep {points} accuracy than {other} that saves as much",
        paper_value=paper_value,
        measured=f"points more than {other} {found.told('{:+.1f}')}; points lost: PSViT {own:.1f}, {other} "
        f"{others:.1f}",
        interval=found.whole.ends,
        verdict=above(found, least),
        reason=f"{ABOVE}; on images that planning did not see; the other saves as much where it can, here "
        f"{100 * more:+z.2f}% in the mean, and asks for no accuracy",
        **common(scale, scale.events, "psvit"),
    )


def by_norm(scale: Scale, plans: Table, uniform: Table, place: str, rate: float) -> Claim:
    """Channels of small norms beside channels drawn by lot."""

    def ahead_by(name: str, rate: float = rate) -> np.ndarray:
        chosen, drawn = (
            of(uniform, "test", model=name, method=place, rate=rate, channels=one) for one in (NORM, LOT)
        )
        return chosen - drawn

    found, own = over(scale.events, ahead_by), gap(plans, scale.events, "test", PSVIT, RANDOM)
    told = [
        f"{name} " + " ".join(f"{ahead_by(name, other).mean():+.1f}" for other in RATES)
        for name in (*scale.events, *scale.digits)
    ]
    return uniform.claim(
        [*uniform.where(channels=(NORM, LOT), method=place), *plans.where(method=(DENSE, PSVIT, RANDOM))],
        claim=f"With {place}, of {rate:g}, channels of small L2 norm cost less than others drawn by lot",
        paper_value="L2 norms are what the sister paper ranks by; no such control",
        measured=f"points more than {scale.draws} draws {found.told('{:+.1f}')}; at rates of "
        f"{', '.join(f'{rate:g}' for rate in RATES)}: {'; '.join(told)}; at PSViT's own counts "
        f"{own.told('{:+.1f}')}",
        interval=found.whole.ends,
        verdict=above(found, 0.0),
        reason=f"{ABOVE}; judged on the models of recordings; as many channels of each unit in both",
        **common(scale, scale.events, "psvit"),
    )


def masks(scale: Scale, plans: Table) -> Claim:
    """What structure costs."""
    found = gap(plans, scale.events, "test", MASKS, PSVIT)
    bare = lost(plans, scale.events, MASKS)
    zeros, held = (
        mean_of(plans, scale.events, measure, method=MASKS).whole.mean for measure in ("matched", "saving")
    )
    return plans.claim(
        plans.where(method=(DENSE, PSVIT, MASKS)),
        claim="Masks of single weights, at the same sparsity, lose less than channels do",
        paper_value="single weights save memory on custom hardware only; accuracy is not compared",
        measured=f"points that channels lose beyond masks {found.told('{:+.1f}')}; masks lose {bare.told()} "
        f"at {zeros:.1f}% zeros, and save {held:.1f}% of the bytes of dense tensors",
        interval=found.whole.ends,
        verdict=above(found, 0.0),
        reason=f"{ABOVE}; the smallest weights of all matrices together; neither is fine-tuned",
        **common(scale, scale.events, "psvit"),
    )


def gained(scale: Scale, recovery: Table, method: str, step: str) -> Found:
    """Points that a step of recovery adds on unseen images."""

    def more(name: str) -> np.ndarray:
        after, before = (of(recovery, "test", model=name, method=method, step=one) for one in (step, BEFORE))
        return after - before

    return over(scale.events, more)


def tuned(scale: Scale, recovery: Table) -> Claim:
    """Fine-tuning."""
    found, dense, collapsed = (gained(scale, recovery, one, TUNED) for one in (PSVIT, DENSE, COLLAPSED))
    trained = Table(recovery.where(step=TUNED), recovery.seconds)
    left = lost(trained, scale.events, PSVIT)
    return recovery.claim(
        recovery.where(step=(BEFORE, TUNED)),
        claim="Fine-tuning gives back accuracy that PSViT's plans lose",
        paper_value="70.3% to 72.8%, +2.5 points",
        measured=f"points gained {found.told('{:+.1f}')}; by the same training the dense model gains "
        f"{dense.told('{:+.1f}')}, and one with {COLLAPSING:.0%} of all units cut {collapsed.told('{:+.1f}')}"
        f"; below the dense model after both were trained {left.told('{:+.1f}')}",
        interval=found.whole.ends,
        verdict=above(found, 0.0),
        reason=f"{ABOVE}; {scale.passes} passes over new recordings of the training images, a twentieth of "
        "training, at a quarter of its rate; on images that neither planning nor training saw",
        **common(scale, scale.events, "psvit"),
    )


def norms(scale: Scale, recovery: Table) -> Claim:
    """Batch norms measured anew, of a model that has collapsed and of those that have not."""
    collapsed, mild, dense = (gained(scale, recovery, one, NORMS) for one in (COLLAPSED, PSVIT, DENSE))
    rescued = [one.ends[0] > 0 for one in collapsed.each.values()]
    harmed = [one.ends[1] < 0 for one in mild.each.values()]
    return recovery.claim(
        recovery.where(step=(BEFORE, NORMS)),
        claim="Batch norms measured anew rescue a model that has collapsed, and harm one that has not",
        paper_value="not told",
        measured=f"points gained, {COLLAPSING:.0%} of all units cut {collapsed.told('{:+.1f}')}; PSViT's "
        f"plans {mild.told('{:+.1f}')}; the dense model {dense.told('{:+.1f}')}",
        interval=collapsed.whole.ends,
        verdict=graded(rescued + harmed, [all(rescued), all(harmed)]),
        reason="reproduced where both are so of each model, whole intervals, partly where one of both is; "
        f"{scale.statistics} training recordings, layer after layer, no gradient; what it does to the dense "
        "model is not the cut's doing",
        **common(scale, scale.events, "psvit"),
    )


def still(scale: Scale, uniform: Table) -> Claim:
    """Still images: one rate for all blocks."""
    wanted = uniform.where(model=scale.digits, method=BLOCKS, rate=HALF, channels=NORM)
    saving = [100 * row["saving"] for row in wanted]
    dense = uniform.where(model=scale.digits, method=DENSE)
    test = lost(Table([*wanted, *dense], uniform.seconds), scale.digits, BLOCKS)
    return uniform.claim(
        uniform.where(model=scale.digits, method=(DENSE, BLOCKS)),
        claim=f"On still digits one rate of {HALF:g} for blocks saves {STILL_SAVES:g}% at "
        f"{STILL_LOSES:g} points",
        paper_value="uniform rates come first; not told alone",
        measured=f"points lost {test.told()}; saves {np.mean(saving):.1f}%",
        interval=test.whole.ends,
        verdict=graded(
            [one.ends[1] <= STILL_LOSES for one in test.each.values()] + [min(saving) >= STILL_SAVES],
            [test.whole.mean <= STILL_LOSES and min(saving) >= STILL_SAVES],
        ),
        reason="reproduced where each model loses no more, whole intervals, partly where they lose no more "
        "in the mean; channels by norm, so that no image was needed; these models hardly use their blocks",
        **common(scale, scale.digits, "psvit"),
    )


PAPER = Paper(scales=SCALES, lay=lay, laying=LAYING, parts=parts, verdicts=verdicts)
