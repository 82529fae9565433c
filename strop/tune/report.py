"""One HTML file that tells the outcome of a study to somebody who was not there.

Every table is readable without JavaScript.  All numbers are worded here and in
``report_measures.py``; the template (``report.html.j2``) and its script only lay them out.  Labels
and reasons are treated as hostile text.  What is not covered: measuring, ranking and choosing,
which the study brings; and what all pages share, which is in ``core/page``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from strop.core import page
from strop.core.files import atomic
from strop.tune.report_measures import (
    MEASURES,
    MISSING,
    Row,
    allowed,
    between,
    join,
    percent,
    pick,
    ratio,
    share,
    shown,
    size,
)

KEPT = 0.9
"""Share of features below which a recipe within the drop is warned of."""
SLOT_TITLES = {"kv": "KV cache"}
STATES = ("measured", "refused", "failed", "skipped")


def drop_in_words(quality: Mapping[str, Any]) -> tuple[str, float | None]:
    """The name and the estimate of the measure that `drop_hi` is the upper limit of."""
    high = quality.get("drop_hi")
    for name, key in (("perplexity rise", "ppl_rise"), ("loss of exact match", "exact_match_loss")):
        if high is not None and quality.get(f"{key}_hi") == high:
            return name, quality.get(key)
    return "quality drop", None


def clauses(row: Row, max_drop: float | None) -> Iterable[str]:
    """What the chosen recipe keeps and saves, one clause a measure."""
    high = pick(row, "quality.drop_hi")
    if high is not None:
        name, estimate = drop_in_words(row["quality"])
        measured = "" if estimate is None else f"measured {percent(estimate)}, "
        measured += f"upper limit {percent(high)}"
        if max_drop is None:
            yield f"costs a {name} ({measured})"
        else:
            keeps = "keeps" if high <= max_drop else "does not keep"
            yield f"{keeps} the {name} within {share(max_drop)} ({measured})"
    if pick(row, "memory.ratio") is not None:
        yield f"needs {ratio(row['memory']['ratio'])} of the memory"
    step, low, high = pick(row, "speed.step_ratio") or (None, None, None)
    if step is not None:
        doubt = ": no clear difference" if low is not None and low <= 1 <= (high or 0) else ""
        interval = between(low, high, ratio)
        yield f"takes {ratio(step)} of the time per token" + (
            f" (95\u00a0% interval {interval}{doubt})" if interval else ""
        )
    if row.get("reuse"):
        first, low, high = row["speed"]["ttft_ratio"]
        computed = percent(row["reuse"]["computed_share"])
        yield (
            f"takes {ratio(first)} of the time to the first token (95\u00a0% interval "
            f"{between(low, high, ratio)}), computing {computed} of the prompts' tokens"
        )


def outcome(rows: list[Row], chosen: Row, max_drop: float | None) -> str:
    """The study in one or two sentences."""
    if chosen is not rows[0]:
        *first, last = list(clauses(chosen, max_drop)) or ["is the recipe chosen"]
        return f"{chosen['label']} {', '.join(first)}{' and ' if first else ''}{last}."
    others = [row for row in rows[1:] if row["status"] == "measured"]
    stays = "The model stays as it is"
    if not others:
        return f"{stays}: no other recipe was measured."
    if any(row["within_drop"] for row in others):
        return f"{stays}: no recipe within {allowed(max_drop)} scores better."
    sentence = f"{stays}: no recipe out of {len(others)} is shown to be within {allowed(max_drop)}."
    limits = [row for row in others if pick(row, "quality.drop_hi") is not None]
    if not limits:
        return sentence
    nearest = min(limits, key=lambda row: row["quality"]["drop_hi"])
    bound = percent(nearest["quality"]["drop_hi"])
    return f"{sentence} The nearest is {nearest['label']}, with an upper limit of {bound}."


def verdict(row: Row, baseline: bool) -> tuple[str, str]:
    """The class (for colour) and the words for what became of a recipe."""
    if row["status"] != "measured":
        return row["status"], f"{row['status']}: {row['reason'] or 'no reason was given'}"
    if row["chosen"]:
        return "chosen", "chosen: the model as it is" if baseline else "chosen"
    if baseline:
        return "baseline", "baseline"
    beaten = f"dominated by {row['dominated_by']}" if row["dominated_by"] else ""
    if not row["within_drop"]:
        return "outside", join("over the allowed drop", beaten)
    return ("frontier", "on the frontier") if row["on_frontier"] else ("dominated", beaten or "dominated")


def point(row: Row, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the charts need of a measured recipe, the words of its hover label included."""
    method = row["recipe"].get("kv") if entry["changed"] == ["kv"] else None
    name = family = next(iter(method), None) if isinstance(method, Mapping) else None
    store = method[family].get("store") if family and isinstance(method[family], Mapping) else None
    if isinstance(store, Mapping):
        family = f"{family} in {next(iter(store), None)}"
    hover = [
        f"{title}: {cell.text}" + (f" ({cell.note})" if cell.note else "")
        for title, cell in entry["cells"].items()
        if cell.text != MISSING
    ]
    return {
        "label": row["label"], "baseline": entry["baseline"], "chosen": row["chosen"],
        "frontier": row["on_frontier"], "within": row["within_drop"], "family": family,
        "setting": str(row["slots"].get("kv")).removeprefix(str(name)).strip(),
        "memory": pick(row, "memory.ratio"), "kv": pick(row, "memory.kv_bytes"),
        "time": pick(row, "speed.step_ratio"), "drop": pick(row, "quality.drop_hi"),
        "kl": [pick(row, f"quality.{key}") for key in ("kl", "kl_lo", "kl_hi")],
        "exact": pick(row, "quality.exact_match"),
        "hover": [entry["verdict"], *hover],
    }  # fmt: skip


def scope(study: Mapping[str, Any]) -> str:
    """What the numbers hold for: text, batch, context and device."""
    texts = shown(study, "data.texts", "{:,}".format, "{} texts")
    tokens = shown(study, "data.tokens", "{:,}".format, "{} tokens")
    name = shown(study, "data.name", str, " of {}")
    batch = shown(study, "settings.batch", str, "batch {}")
    context = shown(study, "settings.context", "{:,}".format, "context {} tokens")
    device = shown(study, "settings.device", str, "on {}")
    said = f"Measured on {join(texts, tokens)}{name}; {join(batch, context, device)}."
    return " ".join([said, *elsewhere(study["rows"])])


def elsewhere(rows: Iterable[Row]) -> Iterable[str]:
    """What to know of times that were measured side by side."""
    nodes = Counter(row["node"] for row in rows if row.get("node"))
    if nodes:
        where = join(*(f"{many} on {node}" for node, many in nodes.items()))
        yield (
            f"Recipes measured by Ray: {where}. Each was timed in turns with the model as it is, in one "
            "process; times of different rows are not comparable."
        )


def warnings(rows: Iterable[Row], max_drop: float | None) -> Iterable[str]:
    """Recipes that keep the quality and lose features."""
    few = [
        f"{row['label']} ({percent(row['audit']['survived'])})"
        for row in rows
        if row["within_drop"] and row.get("audit") and row["audit"]["survived"] < KEPT
    ]
    if few:
        yield (
            f"Within {allowed(max_drop)}, and yet less than {share(KEPT)} of the model's features survive: "
            f"{', '.join(few)}. `strop audit` shows which."
        )


def figures(rows: list[Row], chosen: Row, max_drop: float | None) -> list[tuple[str, str, str]]:
    """The few numbers at the top of the page: name, value, small print."""
    whole = shown(rows[0], "memory.total_bytes", size, " instead of {}")
    notes = {"Memory": whole, "Drop, upper limit": allowed(max_drop)}
    found = []
    for measure in MEASURES:
        cell = measure.cell(chosen)
        if measure.brief and measure.title != "KL" and cell.text != MISSING:
            found.append((measure.title, cell.text, cell.note + notes.get(measure.title, "")))
    tally = Counter(row["status"] for row in rows)
    states = [f"{tally[state]} {state}" for state in STATES if tally[state]]
    return [*found, ("Recipes tried", str(len(rows)), join(*states))]


def line(row: Row, baseline: Row) -> dict[str, Any]:
    """A table row: what the template prints for one recipe, and which slots it changes."""
    kind, words = verdict(row, row is baseline)
    return {
        "label": row["label"], "kind": kind, "verdict": words, "baseline": row is baseline,
        "slots": row["slots"], "cells": {measure.title: measure.cell(row) for measure in MEASURES},
        "changed": [s for s, value in row["slots"].items() if value != baseline["slots"].get(s)],
        "yaml": yaml.safe_dump(row["recipe"], sort_keys=False, allow_unicode=True),
        "order": (row["status"] != "measured", not row["within_drop"],
                  math.inf if row["score"] is None else row["score"]),
    }  # fmt: skip


def view(study: Mapping[str, Any]) -> dict[str, Any]:
    """The study in words, as the template wants it."""
    rows, max_drop = study["rows"], study["settings"].get("max_drop")
    chosen = next((row for row in rows if row["chosen"]), rows[0])
    lines = [line(row, rows[0]) for row in rows]
    points = [
        point(row, entry) for row, entry in zip(rows, lines, strict=True) if row["status"] == "measured"
    ]
    names = dict.fromkeys(slot for row in rows for slot in row["slots"])
    slots = [(slot, SLOT_TITLES.get(slot, slot.capitalize())) for slot in names]
    lines.sort(key=lambda entry: entry["order"])
    groups = [
        (f"{title} alone", [entry for entry in lines if entry["changed"] == [slot]]) for slot, title in slots
    ]
    groups.append(("Compositions", [entry for entry in lines if len(entry["changed"]) > 1]))
    return {
        **study,
        "outcome": outcome(rows, chosen, max_drop),
        "scope": scope(study),
        "allowed": allowed(max_drop),
        "warnings": list(warnings(rows, max_drop)),
        "figures": figures(rows, chosen, max_drop),
        "lines": lines,
        "groups": [(title, members) for title, members in groups if members],
        "slots": slots,
        "measures": [
            measure
            for measure in MEASURES
            if any(entry["cells"][measure.title].text != MISSING for entry in lines)
        ],
        "charts": {"points": points, "max_drop": max_drop},
        "families": list(dict.fromkeys(p["family"] for p in points if p["family"])),
    }


def render(study: Mapping[str, Any]) -> str:
    """The whole page."""
    return page.render("strop.tune", "report", study, view)


def write_report(study: Mapping[str, Any], path: Path) -> None:
    """Write the page for `study` to `path`, whole or not at all."""
    with atomic(path) as draft:
        draft.write_text(render(study), encoding="utf-8")
