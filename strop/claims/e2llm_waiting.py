"""Claims of E2LLM about simulated requests: how long they wait and how fast they decode, plan by plan."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from strop.claims.base import Claim, Table, graded, interval, listed, ratio
from strop.claims.e2llm_bed import (
    CV,
    E2LLM,
    E2LLM_TOLD,
    LENDING,
    LENGTHS,
    MEMORY,
    MIN_TPS,
    MIXED,
    PERIODS,
    SINGLE,
    SPLITWISE,
    SPLITWISE_TOLD,
    UNBOUND,
    Scale,
)
from strop.claims.fleet_bed import mostly
from strop.serve.routing.splitwise import Splitwise

SAME = 1 + 1e-9
"""Times the least phase up to which it is reached."""
SHORTER = {"extended": 0.6, "custom": 0.8}
"""Waiting over adapted Splitwise's at a period of `CROWDED` that is much shorter."""
CROWDED = 0.5
HALF = 0.5
"""Waiting over adapted Splitwise's that the abstract promises."""
WAITED = {
    "extended": (0.39, 0.36, 0.05, 0.20),
    "custom": (0.68, 0.48, 0.58, 0.32),
}
"""Waiting over adapted Splitwise's in the paper, by period."""
DECODED = {
    "extended": ((16.9, 8.9), (17.4, 9.0), (20.1, 10.2), (30.0, 12.1)),
    "custom": ((15.0, 10.1), (16.2, 10.7), (18.4, 10.7), (17.0, 11.3)),
}
"""Tokens a second of a request in the paper, E2LLM's and adapted Splitwise's."""
MEDIANS = {"extended": (16.2, 16.1, 16.6, 29.7), "custom": (14.9, 15.2, 15.1, 14.8)}
"""The median of E2LLM's."""
CELLS = [(data, period) for data in LENGTHS for period in PERIODS]
DRAWN = (
    f"lengths are Gamma-distributed with a coefficient of variation of {CV}, a guess, for the paper gives "
    "means only; times of the seven devices are fitted, not measured"
)


def common(scale: Scale, varied: str) -> dict[str, Any]:
    """The fields that all of these claims share."""
    seeds = scale.instances if varied == "devices" else scale.seeds
    return {"paper": "e2llm", "scale": scale.name, "seeds": seeds, "varied": varied}


def phase(runs: Table, data: str, plan: str) -> float:
    """Seconds of a request of the busier role, as predicted."""
    return float(runs.pick("phase", data=data, plan=plan, period=CROWDED))


def _over(runs: Table, measure: str, plan: str, under: str, cell: tuple[str, float]) -> Any:
    """Ratio of two plans in one cell, and its interval over seeds."""
    data, period = cell
    one, other = (runs.pick(measure, data=data, plan=name, period=period) for name in (plan, under))
    return ratio(one, other)


def _cells(found: Mapping[tuple[str, float], str]) -> str:
    """Words for every cell, by data."""
    return "; ".join(f"{data} " + " ".join(found[data, period] for period in PERIODS) for data in LENGTHS)


def _named(cell: tuple[str, float]) -> str:
    return f"{cell[0]} every {cell[1]:g} s"


def _beside(runs: Table) -> tuple[dict[tuple[str, float], Any], str]:
    """Waiting over adapted Splitwise's in all cells, and the same in words beside the paper's."""
    found = {cell: _over(runs, "wait", E2LLM, SPLITWISE, cell) for cell in CELLS}
    told = {
        (data, period): f"{found[data, period][0]:.2f} (paper {paper:.2f})"
        for data, row in WAITED.items()
        for period, paper in zip(PERIODS, row, strict=True)
    }
    return found, _cells(told)


def waits_less(scale: Scale, runs: Table) -> Claim:
    """Mean waiting beside adapted Splitwise's."""
    found, told = _beside(runs)
    own, base = (
        {cell: f"{np.mean(runs.pick('wait', data=cell[0], plan=plan, period=cell[1])):.1f}" for cell in CELLS}
        for plan in (E2LLM, SPLITWISE)
    )
    (mean, ends), (other, others) = (found[data, CROWDED] for data in LENGTHS)
    below = [high <= SHORTER[data] for data, (_, high) in zip(LENGTHS, (ends, others), strict=True)]
    order = [high < 1 for _, (_, high) in found.values()]
    growth = {
        data: (phase(runs, data, E2LLM) - CROWDED) / (phase(runs, data, SPLITWISE) - CROWDED)
        for data in LENGTHS
    }
    papers = {data: _over(runs, "wait", E2LLM_TOLD, SPLITWISE_TOLD, (data, CROWDED))[0] for data in LENGTHS}
    limits = listed(SHORTER)
    return runs.claim(
        runs.where(plan=(E2LLM, SPLITWISE, E2LLM_TOLD, SPLITWISE_TOLD)),
        claim="Requests wait far less than under adapted Splitwise, and less at every period",
        paper_value="waiting 75.1 against 191.1 s (extended, 0.5 s), 167.1 against 246.9 s (custom, 0.5 s)",
        measured=f"mean waiting, E2LLM / adapted Splitwise, every {CROWDED:g} s: extended {mean:.2f}, custom "
        f"{other:.2f}; every {', '.join(f'{p:g}' for p in PERIODS)} s: {told}; seconds of E2LLM: "
        f"{_cells(own)}; of adapted Splitwise: {_cells(base)}",
        interval=ends,
        verdict=graded([*below, *order], [*below, all(order)]),
        reason=f"reproduced up to {limits} every {CROWDED:g} s and below 1 in all of eight cells, whole "
        f"intervals, here {sum(order)}; {scale.requests} requests a run, which begins with "
        f"all places free; by the phases waiting grows as {listed(growth)}; the paper's baseline decoded 8.9 "
        f"tokens a second a request though planned for {MIN_TPS:g}, which no simulation by the "
        f"planner's law shows; the paper's own two plans on these devices: {listed(papers)}; judged "
        f"beside Splitwise as the paper adapts it, which lends nothing; {DRAWN}",
        **common(scale, "lengths"),
    )


def halves(scale: Scale, runs: Table) -> Claim:
    """The abstract's promise."""
    found, told = _beside(runs)
    low = [high <= HALF for _, (_, high) in found.values()]
    order = sorted(CELLS, key=lambda cell: found[cell][0])
    middle, worst = order[len(order) // 2], order[-1]
    return runs.claim(
        runs.where(plan=(E2LLM, SPLITWISE)),
        claim="Waiting is less than half of adapted Splitwise's",
        paper_value="over 50 % less; by its table in six of eight cells",
        measured=f"mean waiting, E2LLM / adapted Splitwise, {found[middle][0]:.2f} in the median cell "
        f"({_named(middle)}), {found[worst][0]:.2f} in the worst ({_named(worst)}); less than half in "
        f"{sum(low)} of eight: {told}",
        interval=found[middle][1],
        verdict=graded(low, [mostly(low)]),
        reason="whole intervals, partly where most cells show it; the median cell is the higher of the two "
        "in the middle; the ratio is smallest between both phases, where one plan keeps up and the other "
        f"does not, and near 1 or above where both do; {DRAWN}",
        **common(scale, "lengths"),
    )


def waits_less_than_lending(scale: Scale, runs: Table) -> Claim:
    """Mean waiting beside that of Splitwise's mixed pool, which the paper does not compare with."""
    found = {cell: _over(runs, "wait", E2LLM, LENDING, cell) for cell in CELLS}
    less = [high < 1 for _, (_, high) in found.values()]
    mean, ends = found["extended", CROWDED]

    def told(measure: str, plan: str, under: str) -> str:
        return _cells({cell: f"{_over(runs, measure, plan, under, cell)[0]:.2f}" for cell in CELLS})

    rates = {
        cell: f"{np.mean(runs.pick('rate', data=cell[0], plan=UNBOUND, period=cell[1])):.1f}"
        for cell in CELLS
    }
    return runs.claim(
        runs.where(plan=(E2LLM, SPLITWISE, LENDING, UNBOUND)),
        claim=f"Requests wait less than under {LENDING}, within the plan's places, at every period",
        paper_value="not compared: the paper's Splitwise is adapted and lends nothing",
        measured=f"mean waiting, E2LLM / {LENDING}, extended every {CROWDED:g} s {mean:.2f}; every "
        f"{', '.join(f'{p:g}' for p in PERIODS)} s: {told('wait', E2LLM, LENDING)}; time to the last token, "
        f"the same ratio: {told('total', E2LLM, LENDING)}; tokens a second of a request: "
        f"{told('rate', E2LLM, LENDING)}; waiting, {LENDING} / adapted Splitwise: "
        f"{told('wait', LENDING, SPLITWISE)}; beside {UNBOUND}, which gives {_cells(rates)} tokens a "
        f"second: waiting {told('wait', E2LLM, UNBOUND)}, to the last token {told('total', E2LLM, UNBOUND)}",
        interval=ends,
        verdict=graded(less, [mostly(less)]),
        reason=f"whole intervals below 1, here {sum(less)} of eight, "
        "partly where most are; it runs on adapted Splitwise's replicas and lends them to the other role "
        f"above {Splitwise().pending:,.0f} pending prompt tokens or where no place is free; places are the "
        f"plan's, which keep {MIN_TPS:g} tokens a second; the original is bounded by memory alone, so that "
        "more decode at once and each more slowly, which is told and not judged; prompts read between steps "
        f"take longer and wait in no queue, which the time to the last token shows; {DRAWN}",
        **common(scale, "lengths"),
    )


def decodes_faster(scale: Scale, runs: Table) -> Claim:
    """Tokens a second of a request beside adapted Splitwise's."""
    found = {cell: _over(runs, "rate", E2LLM, SPLITWISE, cell) for cell in CELLS}
    told = {}
    for data, row in DECODED.items():
        for period, paper in zip(PERIODS, row, strict=True):
            own, base = (
                np.mean(runs.pick("rate", data=data, plan=p, period=period)) for p in (E2LLM, SPLITWISE)
            )
            told[data, period] = f"{own:.1f}/{base:.1f} (paper {paper[0]}/{paper[1]})"
    mean, ends = found["extended", CROWDED]
    faster = [low > 1 for _, (low, _) in found.values()]
    return runs.claim(
        runs.where(plan=(E2LLM, SPLITWISE)),
        claim="Requests decode faster than under adapted Splitwise at every period",
        paper_value="1.5 to 2.5 times as fast",
        measured=f"tokens a second of a request, E2LLM / adapted Splitwise, extended every {CROWDED:g} s "
        f"{mean:.2f}; both by period: {_cells(told)}",
        interval=ends,
        verdict=graded(faster, [mostly(faster)]),
        reason=f"whole intervals above 1, here {sum(faster)} of eight, partly where most are; {DRAWN}",
        **common(scale, "lengths"),
    )


def keeps_speed(scale: Scale, runs: Table) -> Claim:
    """The least speed that was planned for."""
    medians = {cell: runs.pick("p50", data=cell[0], plan=E2LLM, period=cell[1]) for cell in CELLS}
    ends = {cell: interval(values) for cell, values in medians.items()}
    lowest = min(CELLS, key=lambda cell: np.mean(medians[cell]))
    told = {
        (data, period): f"{np.mean(medians[data, period]):.1f} (paper {paper})"
        for data, row in MEDIANS.items()
        for period, paper in zip(PERIODS, row, strict=True)
    }
    tenth, mixed = (
        min(float(np.mean(row["p10"])) for row in runs.where(plan=plan)) for plan in (E2LLM, MIXED)
    )
    return runs.claim(
        runs.where(plan=(E2LLM, MIXED)),
        claim=f"A plan for {MIN_TPS:g} tokens a second gives requests as much (by construction)",
        paper_value="planned 15, to allow for what is not modelled; medians 14.8 to 29.7",
        measured=f"median tokens a second of a request, the lowest of eight cells "
        f"{np.mean(medians[lowest]):.1f}; by period: {_cells(told)}; lowest tenth in any cell {tenth:.1f}",
        interval=ends[lowest],
        verdict=graded(
            [low >= MIN_TPS for low, _ in ends.values()], [high >= MIN_TPS for _, high in ends.values()]
        ),
        reason="a check of simulator and planner, not a finding: a replica that only decodes is disturbed by "
        "nothing here, so that it falls no lower; what lowers real ones, contexts that grow, is in no "
        f"profile; replicas that read prompts in between have a lowest tenth of {mixed:.1f}; {DRAWN}",
        **common(scale, "lengths"),
    )


def disaggregates(scale: Scale, search: Table, runs: Table) -> Claim:
    """What the paper leaves out: replicas that prefill and decode."""
    crowded = {data: _over(runs, "wait", MIXED, E2LLM, (data, CROWDED)) for data in LENGTHS}
    phases = {
        name: {data: phase(runs, data, name) / phase(runs, data, E2LLM) for data in LENGTHS}
        for name in (MIXED, SINGLE, MEMORY)
    }
    waits = {
        name: {data: _over(runs, "wait", name, E2LLM, (data, CROWDED))[0] for data in LENGTHS}
        for name in (SINGLE, MEMORY)
    }
    totals = {
        data: " ".join(f"{_over(runs, 'total', MIXED, E2LLM, (data, period))[0]:.2f}" for period in PERIODS)
        for data in LENGTHS
    }
    over = np.array([row[MIXED] / row[E2LLM] for row in search.rows])
    told = ", ".join(f"{data} {mean:.2f} ({a:.2f} to {b:.2f})" for data, (mean, (a, b)) in crowded.items())
    shorter = [low > 1 for _, (low, _) in crowded.values()]
    return runs.claim(
        runs.where(plan=(E2LLM, MIXED, SINGLE, MEMORY)),
        claim="Replicas of one role each serve more than replicas that prefill and decode",
        paper_value="not compared",
        measured=f"mean waiting, {MIXED} / E2LLM, every {CROWDED:g} s: {told}; time to the last token by "
        f"period: {listed(totals, '{}')}; predicted phase / E2LLM's: "
        + "; ".join(f"{name} {listed(values)}" for name, values in phases.items())
        + f"; {MIXED} on random sets {over.mean():.2f}, shorter on {(over < 1 / SAME).mean():.0%}; waiting / "
        "E2LLM's: " + "; ".join(f"{name} {listed(values)}" for name, values in waits.items()),
        interval=crowded["extended"][1],
        verdict=graded(
            [*shorter, *(value > 1 for value in phases[MIXED].values())],
            shorter,
        ),
        reason="reproduced where it is predicted and simulated for both lengths, partly where simulated "
        "for one; replicas of both roles come from the same search, read prompts in chunks of 2,048 tokens "
        f"between steps, send no KV, and are planned for {MIN_TPS:g} tokens a second; {DRAWN}",
        **common(scale, "lengths"),
    )
