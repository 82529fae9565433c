"""VaSE (arXiv 2606.03928): what the paper claims, and what the experiments here say to it.

Each hypothesis reads the tables of `vase_bed.run`, applies thresholds named here or in `vase_mechanism.py`,
and becomes a `Claim`. The first number of `measured` is the one that `interval` belongs to. Here are the
claims about answers: a reasoner of 3 million parameters whose problems state facts first and ask for them
later, while most of what the paper evicts was written by the model itself.
"""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from strop.claims.base import Claim, Paper, Table, graded, interval, listed, ratio
from strop.claims.codec_bed import PLAIN, PLANTED
from strop.claims.evict_policies import (
    ATTN_V,
    CUR,
    DKV,
    EVICT_LARGE,
    POLICIES,
    R_KV,
    RANKED,
    SAMPLED,
    SELECTION,
    SNAP,
)
from strop.claims.evict_study import FULL, Regime
from strop.claims.vase_bed import LAYING, SCALES, Scale, lay, parts
from strop.claims.vase_mechanism import mechanism, system

REACHES = 0.05
"""Exact match that lies no further below selection's has reached it."""
SETS = "sets of problems, policy seeds"
Estimate = tuple[float, tuple[float, float]]
"""A value and its interval."""
PAPER_ANSWERS = "average of 5 tasks, Qwen3-4B: "


def verdicts(tables: dict[str, Table], scale: Scale) -> list[Claim]:
    """Every hypothesis against the tables."""
    solving = tables["solving"]
    return [
        above(
            scale,
            solving,
            [(ATTN_V, SNAP), (ATTN_V, R_KV)],
            claim="At the same budget VaSE-AttnV solves more than SnapKV and R-KV",
            paper_value=PAPER_ANSWERS + "AttnV 59.1, R-KV 54.7, SnapKV 49.2; R-KV ahead on 2 tasks",
        ),
        above(
            scale,
            solving,
            [(DKV, CUR)],
            claim="A projection drawn anew at every eviction (VaSE-DKV) beats a frozen one (CurDKV)",
            paper_value=PAPER_ANSWERS + "DKV 57.5, CurDKV 49.8",
        ),
        above(
            scale,
            solving,
            [(ATTN_V, RANKED), (SAMPLED, SNAP)],
            claim="Sampling by attention solves more than ranking by it, with reserved values and without",
            paper_value="GSM8K, K=512: 85.2 against 80.5 with reserved values, 70.9 against 64.3 without",
        ),
        evict_large(scale, solving, tables["twins"]),
        selection(scale, solving),
        *mechanism(scale, tables),
        *system(scale),
    ]


def above(
    scale: Scale, table: Table, pairs: Sequence[tuple[str, str]], claim: str, paper_value: str
) -> Claim:
    """Whether one policy solves more than another, in both regimes, for each of the pairs."""
    gaps = {pair: {r.name: gap(table, r, *pair) for r in scale.regimes} for pair in pairs}
    ends = [ends for found in gaps.values() for _, ends in found.values()]
    more, less = [low > 0 for low, _ in ends], [high < 0 for _, high in ends]
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    said = [
        f"{over} - {under}: {listed({name: mean for name, (mean, _) in found.items()}, '{:+.2f}')}"
        for (over, under), found in gaps.items()
    ]
    return table.claim(
        table.where(method=(FULL, *names)),
        paper="vase",
        scale=scale.name,
        claim=claim,
        paper_value=paper_value,
        measured="exact match, " + "; ".join(said),
        interval=gaps[pairs[0]][scale.regimes[0].name][1],
        seeds=scale.sets,
        varied=SETS,
        verdict=graded(more, [any(more) and not any(less)]),
        reason="reproduced where every interval lies above 0, partly where one does and none below; "
        + curves(scale, table, names),
    )


def gap(table: Table, regime: Regime, over: str, under: str, measure: str = "exact_match") -> Estimate:
    """How much further one policy gets than another, with its interval over sets."""
    apart = marks(table, regime, over, measure) - marks(table, regime, under, measure)
    return float(apart.mean()), interval(apart.tolist())


def marks(table: Table, regime: Regime, method: str, measure: str = "exact_match") -> np.ndarray:
    """A measure of a policy for each set, the mean over budgets."""
    return np.mean([row[measure] for row in table.where(regime=regime.name, method=method)], axis=0)


def curves(scale: Scale, table: Table, methods: Sequence[str]) -> str:
    """Exact match at each budget, and the share of the solution repeated as the mean over budgets."""
    said = []
    for regime in scale.regimes:
        full = np.mean(table.pick("exact_match", regime=regime.name, method=FULL))
        found = []
        for name in methods:
            rows = [
                table.pick("exact_match", regime=regime.name, method=name, budget=k) for k in regime.budgets
            ]
            points = "/".join(f"{np.mean(row):.2f}" for row in rows)
            found.append(f"{name} {points} ({marks(table, regime, name, 'repeated').mean():.2f})")
        length = table.where(regime=regime.name)[0]["length"]
        budgets = "/".join(map(str, regime.budgets))
        said.append(f"{regime.name}, K={budgets} of {length}: {', '.join(found)}, full cache {full:.2f}")
    return "zoo:reasoner, exact match by budget (share of the solution repeated): " + "; ".join(said)


def evict_large(scale: Scale, solving: Table, twins: Table) -> Claim:
    """Whether dropping large values first is worse than every other policy, on each model."""
    others = [name for name in POLICIES if name != EVICT_LARGE]
    ahead = {
        r.name: {name: gap(solving, r, name, EVICT_LARGE, "repeated") for name in others}
        for r in scale.regimes
    }
    times = {}
    for model, budget in product((PLAIN, PLANTED), scale.twin_budgets):
        kl = {name: twins.pick("kl", model=model, budget=budget, method=name) for name in POLICIES}
        times[f"{model} K={budget}"] = {name: ratio(kl[EVICT_LARGE], kl[name]) for name in others}
    worst = [
        all(low > even for _, (low, _) in found.values())
        for even, kind in ((0, ahead), (1, times))
        for found in kind.values()
    ]
    return solving.claim(
        [*solving.rows, *twins.rows],
        paper="vase",
        scale=scale.name,
        claim="Dropping the values of the widest range first is the worst policy of all",
        paper_value="GSM8K, K=512: 14.3 against 53.2 of random eviction and 64.3 of SnapKV",
        measured=f"share repeated, next worst - evict-large: {_nearest(ahead)}; KL / next worst's: "
        + _nearest(times),
        interval=min(ahead[scale.regimes[0].name].values())[1],
        seeds=scale.sets,
        varied=SETS,
        verdict=graded(worst, worst),
        reason="judged by the share of the solution repeated, for exact match has ties at zero, and by KL of "
        f"byte models at budgets of {scale.twin_budgets}; reproduced where it is worse than every other, "
        f"intervals apart, in all {len(worst)} places, partly in one",
    )


def _nearest(places: Mapping[str, Mapping[str, Estimate]]) -> str:
    """The least value at each place, and whose it is."""
    found = {place: min(values, key=lambda name: values[name][0]) for place, values in places.items()}
    return ", ".join(f"{place} {places[place][name][0]:.2f} ({name})" for place, name in found.items())


def selection(scale: Scale, table: Table) -> Claim:
    """Whether VaSE solves as much as attending to the best K of all tokens."""
    behind = {(v, r.name): gap(table, r, SELECTION, v) for v in (ATTN_V, DKV) for r in scale.regimes}
    reached = [high <= REACHES for _, (_, high) in behind.values()]
    points = []
    for variant in (ATTN_V, DKV):
        for regime in scale.regimes:
            for budget in regime.budgets:
                place = {"regime": regime.name, "budget": budget}
                best, ours = (
                    np.mean(table.pick("exact_match", method=m, **place)) for m in (SELECTION, variant)
                )
                if best - ours <= REACHES:
                    points.append(f"{variant} at K={budget} ({regime.name})")
    said = [
        f"{variant} {listed({r.name: behind[variant, r.name][0] for r in scale.regimes})}"
        for variant in (ATTN_V, DKV)
    ]
    return table.claim(
        table.where(method=(ATTN_V, DKV, SELECTION, FULL)),
        paper="vase",
        scale=scale.name,
        claim="VaSE solves as much as selection with the full cache, at constant memory",
        paper_value=PAPER_ANSWERS + "AttnV 59.1, SeerAttention-R 58.8, full cache 65.0",
        measured="exact match below selection's: " + "; ".join(said),
        interval=behind[ATTN_V, scale.regimes[0].name][1],
        seeds=scale.sets,
        varied=SETS,
        verdict=graded(reached, [bool(points)]),
        reason=f"selection here reads all keys and attends to the best K and the newest {scale.buffer}, "
        f"which a learned gate imitates; within {REACHES}: {', '.join(points) or 'nowhere'}; "
        + curves(scale, table, [SELECTION]),
    )


PAPER = Paper(scales=SCALES, lay=lay, laying=LAYING, parts=parts, verdicts=verdicts)
