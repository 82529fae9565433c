"""E2LLM (arXiv 2606.03770): what the paper claims, and what planning and simulating here say to it.

Each hypothesis reads the tables of `e2llm_study`, applies thresholds named here and in `e2llm_waiting`, and
becomes a `Claim`. The first number of `measured` is the one that `interval` belongs to. Everything comes out
the same every time.
"""

import numpy as np

from strop.claims.base import Claim, Paper, Row, Table, Tables, graded, interval, listed, ratio
from strop.claims.e2llm_bed import (
    E2LLM,
    FREE,
    LAN,
    LAYING,
    LENGTHS,
    SCALES,
    SPLITWISE,
    Scale,
    lay,
)
from strop.claims.e2llm_study import BUSY, GENETIC, MEANS, TRACES, parts
from strop.claims.e2llm_waiting import (
    SAME,
    common,
    decodes_faster,
    disaggregates,
    halves,
    keeps_speed,
    phase,
    waits_less,
    waits_less_than_lending,
)

NEAR, NEARLY_ALL = 1.03, 0.95
"""Times the least phase from which a plan is near it, and the share of device sets where it has to be."""
MOSTLY = 0.60
"""Share of device sets where the least phase has to be reached."""
MUCH = 1.10
"""Times the phase of E2LLM from which another is much longer."""
CLOSE, FAR = 0.10, 0.25
"""Relative errors of a predicted phase that is close, and of one that is not far off."""


def verdicts(tables: Tables, scale: Scale) -> list[Claim]:
    """Every hypothesis against the tables."""
    search, runs = tables["search"], tables["waiting"]
    return [
        near_optimum(scale, search),
        unconstrained(scale, search, runs),
        waits_less(scale, runs),
        halves(scale, runs),
        waits_less_than_lending(scale, runs),
        decodes_faster(scale, runs),
        keeps_speed(scale, runs),
        bears_tails(scale, tables["tails"]),
        disaggregates(scale, search, runs),
    ]


def near_optimum(scale: Scale, table: Table) -> Claim:
    """The genetic search beside all partitions."""
    over = np.array([row[GENETIC] / row[E2LLM] for row in table.rows])
    near, same = float((over <= NEAR).mean()), float((over <= SAME).mean())
    return table.claim(
        table.rows,
        claim=f"The genetic search comes within {NEAR - 1:.0%} of the best plan on {NEARLY_ALL:.0%} of sets "
        f"of {scale.devices} devices, and finds it on {MOSTLY:.0%}",
        paper_value="not compared with the optimum; population and generations not stated",
        measured=f"phase over the least one {over.mean():.4f}, near on {near:.0%}, the same on {same:.0%}, "
        f"worst {over.max():.3f}",
        interval=interval(over.tolist()),
        verdict=graded([near >= NEARLY_ALL, same >= MOSTLY], [near >= NEARLY_ALL, same >= MOSTLY]),
        reason="random sets whose times and memory are those of the seven devices, scaled, for gpt-oss-20b "
        "and random mean lengths; partly where one of both holds; all partitions of so few devices can be "
        "tried, so that the search is needed for more only",
        **common(scale, "devices"),
    )


def unconstrained(scale: Scale, search: Table, runs: Table) -> Claim:
    """Plans with and without the condition on roles, by prediction."""
    over = np.array([row[SPLITWISE] / row[E2LLM] for row in search.rows])
    edge = {data: phase(runs, data, SPLITWISE) / phase(runs, data, E2LLM) for data in LENGTHS}
    much = [value >= MUCH for value in edge.values()]
    serves = np.isfinite(over)
    return search.claim(
        search.rows,
        claim="Adapted Splitwise, which puts a condition on roles, has at least "
        f"{MUCH:g} times E2LLM's phase on the seven devices, and nowhere a shorter one (by construction)",
        paper_value="decode at full concurrency 372 against 151 tokens a second (extended)",
        measured=f"phase, adapted Splitwise / E2LLM: random sets {over[serves].mean():.3f}, {MUCH:g} or more "
        f"on {(over >= MUCH).mean():.0%} of them; the seven devices {listed(edge)}",
        interval=interval(over[serves].tolist()),
        verdict=graded(much, much),
        reason=f"reproduced from {MUCH:g} on for both lengths, partly for one; that its phase is nowhere "
        "shorter is a check and not judged, for its plans are some of all; the condition: what prefills is "
        "as fast at it as any that decodes; both from all partitions, so that only the condition differs; "
        f"without a plan under the condition: {(~serves).sum()} of {len(over)} sets",
        **common(scale, "devices"),
    )


def bears_tails(scale: Scale, table: Table) -> Claim:
    """Predicted phase against throughput on lengths of traces."""
    found = {
        (name, lengths, network): _error(row)
        for name in TRACES
        for lengths in (name, MEANS)
        for network in (LAN, FREE)
        for row in table.where(trace=name, lengths=lengths, network=network)
    }
    own = {name: found[name, name, LAN] for name in TRACES}
    free, alike = (
        {name: one[0] for (name, lengths, network), one in found.items() if kind(name, lengths, network)}
        for kind in (
            lambda name, lengths, network: lengths == name and network == FREE,
            lambda name, lengths, network: lengths == MEANS and network == LAN,
        )
    )
    told = ", ".join(
        f"{name} {mean:.2f} ({low:.2f} to {high:.2f})" for name, (mean, (low, high)) in own.items()
    )
    waits = {
        name: float(np.mean(table.pick("wait", trace=name, lengths=name, network=FREE))) for name in TRACES
    }
    first = next(iter(own.values()))
    published = all(row["published"] for row in table.rows)
    left = {name: 1 - table.where(trace=name)[0]["fits"] for name in TRACES}
    return table.claim(
        table.rows,
        claim="Means of lengths are enough to predict the phase, heavy tails or not",
        paper_value="robust to the ratio of tokens in and out; no heavy tails, no error of prediction shown",
        measured=f"simulated phase / predicted: {told}; on a network that takes no time: {listed(free)}; on "
        f"equal requests of the same means: {listed(alike)}; waiting at {BUSY:.0%} load on the free "
        f"one is not 0 but, in phases: {listed(waits, '{:.1f}')}",
        interval=first[1],
        verdict=graded(
            [high <= 1 + CLOSE and low >= 1 - CLOSE for _, (low, high) in own.values()],
            [abs(mean - 1) <= FAR for mean, _ in own.values()],
        ),
        reason=f"{'the published traces' if published else 'traces made up in their shape'}; reproduced "
        f"within {CLOSE:.0%}, whole intervals, partly where one is within {FAR:.0%}; the objective counts no "
        "transfer of KV, here of all blocks in full over 920 Mb/s, which keeps a place; longer than the "
        f"smallest replica holds, left out: {listed(left, '{:.1%}')}",
        **common(scale, "requests"),
    )


def _error(row: Row) -> tuple[float, tuple[float, float]]:
    """Simulated over predicted phase."""
    return ratio(row["simulated"], row["phase"])


PAPER = Paper(scales=SCALES, lay=lay, laying=LAYING, parts=parts, verdicts=verdicts)
