"""PrimeSVT's plans in every order, beside PSViT's, on recordings; and on still images, where much can go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from strop.claims.base import Part, Progress, Row, Tables, measured, part
from strop.claims.prune_bed import Bed, Scale
from strop.claims.prune_study import (
    ALL,
    BLOCKS,
    RANDOM,
    beside,
    dense_row,
    plan_row,
    planned,
    unit_rows,
    ways,
)
from strop.claims.psvit_study import PSVIT, TOLERANCE
from strop.prune.base import PruneMethod
from strop.prune.plan import PrunePlan
from strop.prune.primesvt import PrimeSVT
from strop.prune.psvit import PSViT
from strop.prune.search import Search, Try
from strop.prune.units import Unit

SAVING = 0.25
"""What is asked for."""
MEET, SIZE, SMALLEST, BENEFIT, ROBUST, LOTS = (
    f"meet {SAVING:.0%}",
    "largest first",
    "smallest first",
    "most benefit first",
    "most robust first",
    "order by lot",
)
UNTIED, RESERVED = "largest first, ties as they come", "largest first, half reserved"
RESERVE = 0.5
BESIDE = (ALL, BLOCKS, RANDOM)


@dataclass(frozen=True)
class Untied(PrimeSVT):
    """The largest first, and of units of one size the first of the network: no robustness is looked at."""

    def position(self, search: Search, unit: Unit, alone: Sequence[Try]) -> tuple[float, ...]:
        return (-search.size(unit),)


def policies(draws: int) -> dict[str, list[PruneMethod]]:
    """By name; several where an order is drawn by lot."""
    most = {"epsilon": TOLERANCE, "saving": SAVING, "mode": "maximise"}
    return {
        PSVIT: [PSViT(tolerance=TOLERANCE)],
        MEET: [PrimeSVT(epsilon=TOLERANCE, saving=SAVING)],
        SIZE: [PrimeSVT(**most)],
        UNTIED: [Untied(**most)],
        RESERVED: [PrimeSVT(reserve=RESERVE, **most)],
        SMALLEST: [PrimeSVT(order="smallest", **most)],
        BENEFIT: [PrimeSVT(order="benefit", **most)],
        ROBUST: [PrimeSVT(order="robust", **most)],
        LOTS: [PrimeSVT(order="random", seed=seed, **most) for seed in range(draws)],
    }


def policy_study(
    bed: Bed,
    progress: Progress,
    name: str,
    methods: Mapping[str, Sequence[PruneMethod]],
    known: dict[str, list[PrunePlan]],
) -> list[Row]:
    """Every policy on each split; the plans are left in `known` for what is measured next."""
    one = bed.subjects[name]
    rows = [dense_row(one, bed.splits)]
    for policy, draws in methods.items():
        progress(f"{policy}, {name}")
        for draw, method in enumerate(draws):
            known[policy] = planned(one, bed.splits, method)
            rows.append(plan_row(one, bed.splits, policy, known[policy], TOLERANCE) | {"draw": draw})
    return rows


def event_studies(bed: Bed, progress: Progress, scale: Scale, name: str) -> Tables:
    """All policies on recordings, and other ways to save as much as the largest first."""
    one, known = bed.subjects[name], dict[str, list[PrunePlan]]()
    others = {way: draws for way, draws in ways(scale.draws).items() if way in BESIDE}

    def policies_and_others() -> list[Row]:
        rows = policy_study(bed, progress, name, policies(scale.draws), known)
        return rows + beside(one, bed.splits, known[SIZE], others, progress)

    tables = measured("policies", policies_and_others)
    return tables | measured("units", lambda: unit_rows(one, known[SIZE]))


def digit_study(bed: Bed, progress: Progress, scale: Scale, name: str) -> list[Row]:
    """Still images: what is asked for, the most that goes, and one rate that saves as much as the former."""
    chosen = {policy: policies(scale.draws)[policy] for policy in (MEET, SIZE)}
    known: dict[str, list[PrunePlan]] = {}
    rows = policy_study(bed, progress, name, chosen, known)
    others = {ALL: ways(scale.draws)[ALL]}
    return rows + beside(bed.subjects[name], bed.splits, known[MEET], others, progress)


def parts(scale: Scale) -> list[Part]:
    """The experiments."""
    steps = len(policies(scale.draws)) + len(BESIDE)
    return [
        *(Part(f"policies, {n}", steps, partial(event_studies, scale=scale, name=n)) for n in scale.events),
        *(part("digits", n, 3, partial(digit_study, scale=scale, name=n)) for n in scale.digits),
    ]
