"""PrimeSVT (arXiv 2606.03428): what the paper claims, and what plans for small spiking transformers say.

Each hypothesis reads the tables of `primesvt_study`, applies thresholds named here, and becomes a `Claim`.
The first number of `measured` is the one that `interval` belongs to. Policies are compared by what they save
when they go on to the end of the tolerance. The models read digits; of ImageNet nothing follows.
"""

from collections import Counter

import numpy as np

from strop.claims.base import Claim, Paper, Table, Tables, graded, on_a_gpu
from strop.claims.primesvt_study import (
    BENEFIT,
    LOTS,
    MEET,
    RESERVE,
    RESERVED,
    ROBUST,
    SAVING,
    SIZE,
    SMALLEST,
    UNTIED,
    parts,
)
from strop.claims.prune_bed import LAYING, SCALES, Scale, lay
from strop.claims.prune_reading import ABOVE, DENSE, Found, above, common, gap, lost, mean_of, quotient
from strop.claims.prune_study import ALL, BLOCKS, MIDDLE, RANDOM
from strop.claims.psvit import NOT_HERE, ON_IMAGENET, damages
from strop.claims.psvit_study import PSVIT, TOLERANCE

LOSES = 100 * TOLERANCE
"""Points of accuracy that a plan may lose."""
AHEAD = 1.3
"""Times the saving of the smallest first."""
ASKED = 60
"""Evaluations that a plan takes at most."""
APART = 30.0
"""Points by which one rate for all is worse, of still images."""
PAPER_VALUE = "unpruned 73.3%; 70.3% without and 72.9% with fine-tuning"
FIRST = "largest first is the policy; no other order is shown"


def verdicts(tables: Tables, scale: Scale) -> list[Claim]:
    """Every hypothesis against the tables."""
    policies, units, digits = (tables[name] for name in ("policies", "units", "digits"))
    return [
        meets(scale, policies),
        meets_still(scale, digits),
        largest(scale, policies),
        orders(scale, policies),
        reserves(scale, policies),
        beyond(scale, policies, units),
        cheaper(scale, policies),
        holds(scale, policies, digits),
        keeps_more(scale, policies),
        *on_a_gpu("primesvt", scale.name, {ON_IMAGENET["primesvt"]: PAPER_VALUE}, NOT_HERE),
    ]


def feasible(table: Table, models: tuple[str, ...]) -> dict[str, list[bool]]:
    """Whether plans met what was asked for, a split each, by model."""
    return {name: table.pick("feasible", model=name, method=MEET) for name in models}


def meets(scale: Scale, policies: Table) -> Claim:
    """What was asked for, on recordings."""
    found = mean_of(policies, scale.events, "saving", method=MEET)
    test = lost(policies, scale.events, MEET)
    met = feasible(policies, scale.events)
    told = ", ".join(f"{name} {sum(one)} of {len(one)}" for name, one in met.items())
    return policies.claim(
        policies.where(method=(DENSE, MEET)),
        claim=f"PrimeSVT finds a plan that saves {SAVING:.0%} at {LOSES:g} points",
        paper_value="26.68% at 3.0 points (ImageNet)",
        measured=f"saves, in percent, {found.told()}; feasible {told}; points lost on unseen images "
        f"{test.told()}",
        interval=found.whole.ends,
        verdict=graded([all(one) for one in met.values()], [any(one) for one in met.values()]),
        reason="reproduced where it is feasible on every half of the images for each model, partly where on "
        "any; where it is not, the plan says so, and saves what it can within the tolerance",
        **common(scale, scale.events, "primesvt"),
    )


def meets_still(scale: Scale, digits: Table) -> Claim:
    """The same on still images."""
    found = mean_of(digits, scale.digits, "saving", method=MEET)
    test, worse = lost(digits, scale.digits, MEET), gap(digits, scale.digits, "test", MEET, ALL)
    asked = [row["evaluations"] for row in digits.where(method=MEET)]
    met = all(all(one) for one in feasible(digits, scale.digits).values())
    within = max(test.means) <= LOSES
    return digits.claim(
        digits.where(method=(DENSE, MEET, ALL)),
        claim=f"On still digits it saves {SAVING:.0%} at {LOSES:g} points with at most {ASKED} evaluations, "
        f"and one rate for all units is {APART:g} points worse",
        paper_value="not on digits",
        measured=f"points lost on unseen images {test.told()}; saves {found.whole.mean:.1f}%, "
        f"{'always' if met else 'not always'} what was asked for; evaluations {np.mean(asked):.0f} (most "
        f"{np.max(asked)}); one rate for all units loses {worse.told()} more",
        interval=test.whole.ends,
        verdict=graded(
            [met, within, int(np.max(asked)) <= ASKED, min(worse.means) >= APART], [met and within]
        ),
        reason="reproduced where all four are so of each model in the mean, partly where saving and "
        "tolerance are; every unit is tried alone at nine rates first, which is most of the evaluations",
        **common(scale, scale.digits, "primesvt"),
    )


def largest(scale: Scale, policies: Table) -> Claim:
    """Largest first beside smallest first."""
    big, small = (mean_of(policies, scale.events, "saving", method=one) for one in (SIZE, SMALLEST))
    found = quotient(policies, scale.events, "saving", SIZE, SMALLEST)
    return policies.claim(
        policies.where(method=(DENSE, SIZE, SMALLEST)),
        claim=f"The largest first saves {AHEAD:g} times what the smallest first does",
        paper_value=FIRST,
        measured=f"saving, largest / smallest first, {found.told('{:.2f}')}; in percent {big.told()} against "
        f"{small.told()}",
        interval=found.whole.ends,
        verdict=above(found, AHEAD),
        reason=f"{ABOVE}; both go on to the end of the tolerance of {LOSES:g} points",
        **common(scale, scale.events, "primesvt"),
    )


def orders(scale: Scale, policies: Table) -> Claim:
    """Other orders."""
    gaps = {one: gap(policies, scale.events, "saving", SIZE, one) for one in (LOTS, BENEFIT, ROBUST)}
    own = mean_of(policies, scale.events, "saving", method=SIZE)
    told = "; ".join(f"{order} {found.told('{:+.1f}')}" for order, found in gaps.items())
    return policies.claim(
        policies.where(method=(DENSE, SIZE, *gaps)),
        claim="The largest first saves more than orders by lot, by benefit or by robustness",
        paper_value=FIRST,
        measured=f"percent saved beyond {told}; largest first {own.told()}",
        interval=gaps[LOTS].whole.ends,
        verdict=graded(
            [one.ends[0] > 0 for found in gaps.values() for one in found.each.values()],
            [all(found.whole.mean >= 0 for found in gaps.values())],
        ),
        reason="reproduced where it saves more than every other order on each model, whole intervals, partly "
        f"where it saves no less in the mean; {scale.draws} orders by lot; of units of one size the more "
        "robust comes first",
        **common(scale, scale.events, "primesvt"),
    )


def reserves(scale: Scale, policies: Table) -> Claim:
    """Tolerance that is kept for units to come."""
    found = gap(policies, scale.events, "saving", RESERVED, SIZE)
    own, none = (mean_of(policies, scale.events, "saving", method=one).whole.mean for one in (RESERVED, SIZE))
    return policies.claim(
        policies.where(method=(DENSE, SIZE, RESERVED)),
        claim=f"A reserve of {RESERVE:g} of the tolerance saves at least as much as none",
        paper_value="no such setting",
        measured=f"percent saved beyond largest first without one {found.told('{:+.1f}')}; {own:.1f} against "
        f"{none:.1f}",
        interval=found.whole.ends,
        verdict=graded([mean >= 0 for mean in found.means], [found.whole.mean >= 0]),
        reason="reproduced where it is so of each model in the mean, partly where it is of the mean over "
        "models; the reserve keeps the first, largest unit from spending the whole tolerance",
        **common(scale, scale.events, "primesvt"),
    )


def beyond(scale: Scale, policies: Table, units: Table) -> Claim:
    """The ranking of the two papers, and what ties do to it."""

    def more(method: str, other: str) -> Found:
        return gap(policies, scale.events, "saving", method, other)

    found = more(SIZE, PSVIT)
    own, other = (mean_of(policies, scale.events, "saving", method=one).whole.mean for one in (SIZE, PSVIT))
    spent = {
        one: mean_of(policies, scale.events, "spent", method=one).whole.mean
        for one in (SIZE, UNTIED, RESERVED)
    }
    took = ", ".join(f"{name} {one:.0f}%" for name, one in spent.items())
    return policies.claim(
        [*policies.where(method=(DENSE, SIZE, UNTIED, RESERVED, ROBUST, PSVIT)), *units.rows],
        claim="PrimeSVT saves more than PSViT at the same tolerance",
        paper_value="26.68% against 22.4%, +4.3",
        measured=f"percent saved beyond PSViT {found.told('{:+.1f}')}; {own:.1f} against {other:.1f}; with "
        f"half reserved {more(RESERVED, PSVIT).told('{:+.1f}')}, the most robust first "
        f"{more(ROBUST, PSVIT).told('{:+.1f}')}; that the more robust of equal units comes first adds "
        f"{more(SIZE, UNTIED).told('{:+.1f}')}",
        interval=found.whole.ends,
        verdict=above(found, 0.0),
        reason=f"{ABOVE}; size tells units apart only in part: {tied(units)}; the first unit takes of the "
        f"tolerance: {took}; PSViT begins with one rate for all blocks instead; points lost at a rate of "
        f"{MIDDLE:g}, one unit alone: {damages(units)}",
        **common(scale, scale.events, "primesvt"),
    )


def tied(units: Table) -> str:
    """How many units of a model share their size with another."""
    found = []
    for model in dict.fromkeys(row["model"] for row in units.rows):
        sizes = Counter(row["parameters"] for row in units.where(model=model))
        alike = sum(count for count in sizes.values() if count > 1)
        found.append(f"{alike} of the {sizes.total()} of {model} have the size of another")
    return ", ".join(found)


def cheaper(scale: Scale, policies: Table) -> Claim:
    """Evaluations."""
    found = quotient(policies, scale.events, "evaluations", SIZE, PSVIT)
    counts = {
        one: np.mean([row["evaluations"] for row in policies.where(method=one)])
        for one in (MEET, SIZE, PSVIT)
    }
    return policies.claim(
        policies.where(method=(DENSE, MEET, SIZE, PSVIT)),
        claim="PrimeSVT takes fewer evaluations than PSViT",
        paper_value="automation spares days of choosing by hand; evaluations are not counted",
        measured=f"evaluations, PrimeSVT to the end / PSViT, {found.told('{:.2f}')}; "
        + ", ".join(f"{name} {count:.0f}" for name, count in counts.items()),
        interval=found.whole.ends,
        verdict=graded([one.ends[1] < 1 for one in found.each.values()], [found.whole.mean < 1]),
        reason="reproduced below 1 on each model, whole intervals, partly where it is in the mean; maps of "
        "equal counts are asked once; nine rates of each unit alone here, there three and two sweeps of "
        "nine; both are automatic, so that hours of people are not compared",
        **common(scale, scale.events, "primesvt"),
    )


def holds(scale: Scale, policies: Table, digits: Table) -> Claim:
    """The tolerance on images that planning did not see."""
    both = ((policies, scale.events), (digits, scale.digits))
    test, test_still = (lost(table, models, SIZE) for table, models in both)
    val, val_still = (lost(table, models, SIZE, "val") for table, models in both)
    return policies.claim(
        [*policies.where(method=(DENSE, SIZE)), *digits.where(method=(DENSE, SIZE))],
        claim=f"The tolerance of {LOSES:g} points holds on images that planning did not see",
        paper_value="what was planned on and what was judged on are not told apart",
        measured=f"points lost on unseen images, recordings {test.told()}, still digits {test_still.told()}; "
        f"on the plan's own, recordings {val.told()}, still digits {val_still.told()}",
        interval=test.whole.ends,
        verdict=graded(
            [one.ends[1] <= LOSES for found in (test, test_still) for one in found.each.values()],
            [max(test.whole.mean, test_still.whole.mean) <= LOSES],
        ),
        reason=f"the largest first to the end; reproduced where each model loses {LOSES:g} points at most, "
        "whole intervals, partly where they do in the mean, recordings and still images apart; dozens of "
        "maps are accepted or refused on 300 images",
        **common(scale, (*scale.events, *scale.digits), "primesvt"),
    )


def keeps_more(scale: Scale, policies: Table) -> Claim:
    """Other ways to save as much."""
    gaps = {one: gap(policies, scale.events, "test", SIZE, one) for one in (BLOCKS, ALL, RANDOM)}
    told = "; ".join(f"{other} {found.told('{:+.1f}')}" for other, found in gaps.items())
    return policies.claim(
        policies.where(method=(DENSE, SIZE, *gaps)),
        claim=f"At equal saving the largest first keeps more accuracy than {BLOCKS}, {ALL}, or {RANDOM}",
        paper_value="beside unstructured and token pruning; numbers not at hand",
        measured=f"points more than {told}",
        interval=gaps[BLOCKS].whole.ends,
        verdict=graded(
            [one.ends[0] > 0 for found in gaps.values() for one in found.each.values()],
            [gaps[BLOCKS].whole.mean > 0],
        ),
        reason="reproduced where it is so of each model beside all three, whole intervals, partly where it "
        f"is so beside {BLOCKS} in the mean; on images that planning did not see",
        **common(scale, scale.events, "primesvt"),
    )


PAPER = Paper(scales=SCALES, lay=lay, laying=LAYING, parts=parts, verdicts=verdicts)
