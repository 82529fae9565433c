"""One HTML file that says what policies did on a fleet: verdict, table, pictures, the regime.

All numbers are worded here; the template (``fleet.html.j2``) and its script only lay them out. Names are
treated as hostile.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from strop.core import page
from strop.core.files import atomic
from strop.core.words import MISSING, between, percent, seconds, share
from strop.serve.results import STAGES

Cell = tuple[str, str]
"""A value, and its interval or nothing."""
MEANING = {
    "Prefill, decode": (
        "a request's prompt is computed on one instance (prefill), and its answer is generated, a token an "
        "iteration, on another (decode), or on the same one where instances do both."
    ),
    "TTFT": (
        "time to the first token, from a request's arrival: waiting for a prefill instance, the prompt, "
        "bringing its KV to where it decodes, the first iteration there. P99 is exceeded by 1 % of requests."
    ),
    "Change": "of the mean TTFT from the first policy's, seed by seed; below 0 is sooner.",
    "95 % interval": "ends of what the mean may be, from 2000 draws of the seeds with replacement.",
    "TBT": "time between tokens: the mean length of an iteration, weighted by the requests in it.",
    "Transfer": "from a computed prompt until its KV is there, waiting for memory to put it in included.",
    "Tier": (
        "what the two hosts of a transfer share: the same node (nothing crosses the network), rack, pod, or "
        "only the core."
    ),
    "Nearest": "the share of requests that decode on the nearest tier that has decode instances at all.",
    "Gain": (
        "what a choice by distance takes off the mean TTFT, told before anything is simulated from "
        "bandwidths, others' traffic and sizes alone: nobody waits, nothing is cached, no transfers meet. "
        "Where they fill links it is larger."
    ),
    "Seed": (
        "what is drawn anew: arrivals within a step of the trace's clock, others' traffic where it varies, "
        "policies that draw, among them the choice between prefill instances that are alike."
    ),
}


def signed(value: float) -> str:
    """A change in percent, to a tenth."""
    return f"{100 * value:+z.1f}".replace("-", "\N{MINUS SIGN}")


def cell(value: list[Any] | None, show: Callable[[float], str]) -> Cell:
    """An estimate and its interval in words; an absent one is a dash."""
    if value is None or value[0] is None:
        return MISSING, ""
    return show(value[0]), between(value[1], value[2], show)


def columns(told: Mapping[str, Any]) -> dict[str, str]:
    """Titles of the table behind the policy, short and long."""
    return {
        "TTFT": "Mean time to the first token",
        "P99": "TTFT that 1 % exceed",
        "Change, %": f"Mean TTFT against {told['rows'][0]['policy']}",
        f"\N{LESS-THAN OR EQUAL TO} {told['settings']['slo']:g} s": "First token within the bound asked for",
        "TBT": "Mean time between tokens",
        "Transfer": "Mean time until the KV is there",
        "Nearest": f"Decode in the same {told['cluster']['nearest'] or 'place'}",
    }


def cells(told: Mapping[str, Any]) -> Iterator[tuple[str, list[Cell]]]:
    """Policy, and what `columns` has of it."""
    near = told["cluster"]["nearest"]
    for row in told["rows"]:
        yield (
            row["policy"],
            [
                cell(row["ttft_mean"], seconds),
                cell(row["ttft_p99"], seconds),
                cell(row["ttft_change"], signed),
                cell(row["slo"], percent),
                cell(row["tbt_mean"], seconds),
                cell(row["transfer_mean"], seconds) if near else (MISSING, ""),
                (percent(row["tiers"][near]) if near else MISSING, ""),
            ],
        )


def outcome(told: Mapping[str, Any]) -> str:
    """The study in two sentences."""
    first, *rest = told["rows"]
    best = min(told["rows"], key=lambda row: row["ttft_mean"][0])
    within = share_within(best, told)
    if not rest:
        time, ends = cell(first["ttft_mean"], seconds)
        return (
            f"Under {first['policy']} the first token comes after {time} on average{_aside(ends)}. {within}"
        )
    if best is first:
        best_other = min(rest, key=lambda row: row["ttft_mean"][0])
        change, ends = cell(best_other["ttft_change"], signed)
        said = (
            f"No policy brings the first token sooner on average than {first['policy']}, after "
            f"{seconds(first['ttft_mean'][0])}; nearest is {best_other['policy']} with {change}\u00a0%"
        )
        return f"{said}{_aside(ends)}. {within}"
    change, low, high = best["ttft_change"]
    times = [seconds(row["ttft_mean"][0]) for row in (best, first)]
    said = (
        f"Under {best['policy']} the first token comes {percent(-change)} sooner on average than under "
        f"{first['policy']}{_aside(between(*_turned(low, high), percent))}, after {times[0]} instead of "
        f"{times[1]}"
    )
    doubt = ", which the seeds do not tell from nothing" if high is not None and high >= 0 else ""
    return f"{said}{doubt}. {within}"


def share_within(row: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """How many requests keep the bound under the best policy, and under the first."""
    first = told["rows"][0]
    said = f"Within {told['settings']['slo']:g}\u00a0s it serves {percent(row['slo'][0])} of the requests"
    return f"{said}." if row is first else f"{said}, {first['policy']} {percent(first['slo'][0])}."


def _turned(low: float | None, high: float | None) -> tuple[float | None, float | None]:
    return (None, None) if low is None or high is None else (-high, -low)


def _aside(ends: str) -> str:
    return f" (95\u00a0% interval {ends})" if ends else ""


def scope(told: Mapping[str, Any]) -> str:
    """What the numbers hold for."""
    measured, cluster, settings = told["measured"], told["cluster"], told["settings"]
    instances = " and ".join(f"{count} {role}" for role, count in cluster["instances"].items())
    count, span, name = measured["requests"], measured["seconds"], told["trace"]["name"]
    pace = f", {count / span:.3g} a second" if span else ""
    said = (
        f"Simulated: {count:,} request{'s' * (count > 1)} of {name}{pace}, prompts of "
        f"{measured['prompt_mean']:,.0f} tokens and answers of {measured['output_mean']:,.0f} on average, "
        f"under {settings['seeds']} seed{'s' * (settings['seeds'] > 1)}, on {instances} instances of "
        f"a network of {cluster['hosts']} hosts."
    )
    return f"{said} Nothing here ran on a real fleet."


def notes(told: Mapping[str, Any]) -> list[str]:
    """What to know beside the numbers, in sentences."""
    tuned, found = told["tuned"], []
    if tuned:
        found.append(
            f"The weights of cache-load, w_c {tuned['w_c']:g} and w_l {tuned['w_l']:g}, were tuned on the "
            f"first {share(tuned['held_out'])} of the trace's time; all policies are measured on the rest."
        )
    if not told["varied"]:
        found.append(
            "Nothing is drawn in this trace, cluster and these policies: every seed gave the same, so there "
            "are no intervals."
        )
    elif told["settings"]["seeds"] == 1:
        found.append("One seed bounds nothing: there are no intervals.")
    if told["trace"]["skipped"]:
        found.append(f"{skipped(told['trace']['skipped'])}.")
    return found


def skipped(rows: int) -> str:
    """How many rows of a trace were passed over."""
    return f"{rows:,} bad {'row was' if rows == 1 else 'rows were'} skipped"


def speed(told: Mapping[str, Any]) -> str:
    """How fast the simulator was."""
    found = told["speed"]
    were = "request was" if found["requests"] == 1 else "requests were"
    return (
        f"{found['requests']:,} {were} simulated in {seconds(found['seconds'])} of computing, "
        f"{found['per_second']:,.0f} a second."
    )


def view(told: dict[str, Any]) -> dict[str, Any]:
    """The study in words, as the template wants it."""
    stages = [
        {"policy": row["policy"], "parts": [row[f"{name.replace(' ', '_')}_mean"][0] for name in STAGES]}
        for row in told["rows"]
    ]
    tiers = [{"policy": row["policy"], "parts": list(row["tiers"].values())} for row in told["rows"]]
    names = list(told["rows"][0]["tiers"])
    moves = told["cluster"]["nearest"] is not None
    return told | {
        "outcome": outcome(told),
        "scope": scope(told),
        "notes": notes(told),
        "speed": speed(told),
        "columns": columns(told),
        "cells": list(cells(told)),
        "stage_names": STAGES,
        "stages": [(row["policy"], [seconds(value) for value in row["parts"]]) for row in stages],
        "tier_names": names,
        "tiers": [(row["policy"], [percent(value) for value in row["parts"]]) for row in tiers] * moves,
        "policies": [row["policy"] for row in told["rows"]],
        "cluster_facts": {
            key: value for key, value in told["cluster"].items() if key not in ("instances", "nearest")
        }
        | told["cluster"]["instances"],
        "trace_facts": {key: fact(value) for key, value in told["trace"].items() if value not in (0, "")},
        "meaning": MEANING.items(),
        "charts": {
            "stages": {"names": STAGES, "rows": stages},
            "tiers": {"names": names, "rows": tiers},
            "slo": told["settings"]["slo"],
            **{key: told[key] for key in ("ttft", "levels", "load", "times")},
        },
    }


def fact(value: Any) -> Any:
    """A property of a trace; fractions of long times and of means say nothing."""
    return round(value, 1) if isinstance(value, float) else value


def write_report(told: Mapping[str, Any], path: Path) -> None:
    """Write the page to `path`, whole or not at all."""
    with atomic(path) as draft:
        draft.write_text(page.render("strop.serve", "fleet", told, view), encoding="utf-8")
