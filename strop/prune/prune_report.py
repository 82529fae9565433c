"""One HTML file that says what was cut, how sure that is, and what each part of the model can spare.

All numbers are worded here; the template (``prune.html.j2``) and its script only lay them out. Names are
treated as hostile.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from strop.core import page
from strop.core.files import atomic
from strop.core.words import MISSING, join, percent, share, size

STEPS = {"bn": "batch norm statistics measured anew", "finetune": "fine-tuning"}
CURVES = {
    "all": "all units alike",
    "blocks": "units in blocks alike",
    "walk": "the walk",
    "candidates": "frontier",
}
MEANING = {
    "Unit": (
        "channels that leave together: the rows that make them, the norms and biases that hold them, the "
        "columns that read them. Heads keep equally many."
    ),
    "Saved": "parameters that are gone, as a share of those of the dense model.",
    "Planning and test": (
        "the plan was chosen by accuracy on the planning part of the data; the test part was looked at only "
        "at the end. The drop is of the test part, input by input."
    ),
    "Alone": "a unit cut at a rate while all others are whole: how much accuracy that costs.",
    "Sensitive, moderate, robust": (
        "PSViT's words: alone and cut lightly it costs more than the tolerance; in between; alone and cut by "
        "the middle rate it costs half of the tolerance at most."
    ),
    "Target": (
        "PrimeSVT's word: a unit that alone can spare enough to be worth it. They are cut one after another, "
        "and those whose turn does not come stay whole."
    ),
    "Frontier": "of all maps tried those that no other beats in both accuracy and size.",
}
Told = Mapping[str, Any]


def outcome(told: Told) -> str:
    """The run in two sentences."""
    plan, asked = told["plan"], told["asked"]
    saved = 1 - told["parameters"][1] / told["parameters"][0]
    if asked["method"] is None:
        return f"The plan saves {percent(saved)} of the parameters. {drop(told)}"
    if told["feasible"]:
        return f"{asked['method']} saves {percent(saved)} of the parameters. {drop(told)}"
    tolerance = share(asked["tolerance"])
    if asked["method"] == "uniform":
        lost = plan["dense_accuracy"] - plan["accuracy"]
        return (
            f"One rate for all does not do it: to save {percent(saved)} costs {points(lost)} of accuracy on "
            f"the planning part, and {tolerance} was allowed."
        )
    return (
        f"What was asked for cannot be met: within a drop of {tolerance}, {asked['method']} saves "
        f"{percent(saved)} of the parameters, not {share(asked['saving'])}. The nearest plan and the "
        "frontier are here; no model was written."
    )


def drop(told: Told) -> str:
    """What the test part says of the model as it is now."""
    lost, allowed = told["drop"], told["asked"]["tolerance"]
    before, after = (percent(told["test"][name]["accuracy"]) for name in ("dense", "final"))
    said = (
        f"On data that nothing was chosen by, accuracy goes from {before} to {after}, a drop of "
        f"{points(lost['accuracy'])} ± {points(lost['stderr'])}"
    )
    if allowed is None or lost["accuracy"] <= allowed:
        return f"{said}."
    return f"{said}: more than the {share(allowed)} that the plan keeps to on the data that it was chosen by."


def points(value: float) -> str:
    """A difference of two shares."""
    return f"{percent(value)}".replace("%", "points")


def scope(told: Told) -> str:
    """What the numbers hold for."""
    data, plan = told["data"], told["plan"]
    evaluated = f", {plan['evaluations']:,} models evaluated" if plan["evaluations"] else ""
    return (
        f"Accuracy is the share of {told['what']}, of {data['name']}: {data['plan']:,} inputs to plan by, "
        f"{data['test']:,} to test on{evaluated}. ± is a standard error of the mean, over "
        f"{told['drop']['count']:,} independent inputs."
    )


def figures(told: Told) -> Iterator[tuple[str, str, str]]:
    """Name, value and small print of the few numbers at the top."""
    before, after = told["parameters"]
    yield "Parameters saved", percent(1 - after / before), f"{before:,} to {after:,}"
    yield "Size", size(told["bytes"][1]), f"from {size(told['bytes'][0])}"
    test = told["test"]
    yield "Test accuracy", percent(test["final"]["accuracy"]), f"dense {percent(test['dense']['accuracy'])}"
    yield "Drop", points(told["drop"]["accuracy"]), f"± {points(told['drop']['stderr'])}"


def rows(told: Told) -> list[list[str]]:
    """The plan: unit, channels kept, rate, parameters that go with it alone, what the planner says."""
    return [
        [
            row["name"],
            f"{row['kept']:,} of {row['width']:,}",
            percent(1 - row["kept"] / row["width"]),
            f"{row['parameters']:,}",
            row["verdict"] or MISSING,
        ]
        for row in told["plan"]["rows"]
    ]


def steps(told: Told) -> list[list[str]]:
    """Each recovery step: accuracy before and after on the planning part, whether it was kept, test."""
    return [
        [
            STEPS[step["step"]],
            percent(step["before"]),
            percent(step["after"]),
            "kept" if step["kept"] else "left out",
            f"{percent(step['test']['accuracy'])} ± {points(step['test']['stderr'])}",
        ]
        for step in told["steps"]
    ]


def frontier(told: Told) -> list[list[str]]:
    """The maps that no other beats: saving, accuracy, drop."""
    dense = told["plan"]["dense_accuracy"]
    return [
        [percent(one["saving"]), percent(one["accuracy"]), points(dense - one["accuracy"])]
        for one in told["plan"]["candidates"]
    ]


def frozen(pairs: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """What cannot be cut, by reason."""
    counts = Counter(why for _, why in pairs)
    first = {why: name for name, why in reversed(pairs)}
    return [
        (why, first[why] if count == 1 else f"{first[why]} and {count - 1:,} more")
        for why, count in counts.items()
    ]


def heat(plan: Told) -> dict[str, Any] | None:
    """Drop of accuracy by unit and rate, each alone; None where no unit was tried alone."""
    tried = plan["sensitivity"]
    if not tried:
        return None
    units = list(dict.fromkeys(one["what"] for one in tried))
    rates = sorted({one["rate"] for one in tried})
    lost = {(one["what"], one["rate"]): plan["dense_accuracy"] - one["accuracy"] for one in tried}
    return {
        "units": units,
        "rates": rates,
        "drops": [[lost.get((unit, rate)) for rate in rates] for unit in units],
    }


def heat_rows(found: Told | None) -> list[list[str]]:
    """The heat map as a table."""
    if found is None:
        return []
    return [
        [unit, *(MISSING if lost is None else points(lost) for lost in drops)]
        for unit, drops in zip(found["units"], found["drops"], strict=True)
    ]


def curves(plan: Told) -> dict[str, list[dict[str, Any]]]:
    """Accuracy and saving of what was tried, by what it was."""
    found = {name: [one for one in plan["curves"] if one["what"] == name] for name in ("all", "blocks")}
    found |= {"walk": plan["walk"], "candidates": plan["candidates"]}
    return {name: points for name, points in found.items() if points}


def view(told: dict[str, Any]) -> dict[str, Any]:
    """The run in words, as the template wants it."""
    plan, asked = told["plan"], told["asked"]
    map_ = heat(plan)
    lines = curves(plan)
    tolerance = asked["tolerance"]
    charts = {
        "heat": map_,
        "curves": lines,
        "order": list(lines),
        "names": CURVES,
        "dense": plan["dense_accuracy"],
        "tolerance": tolerance,
        "saving": asked["saving"],
        "chosen": {"accuracy": plan["accuracy"], "saving": plan["saving"]},
    }
    return told | {
        "outcome": outcome(told),
        "scope": scope(told),
        "figures": list(figures(told)),
        "rows": rows(told),
        "steps": steps(told),
        "frontier": frontier(told),
        "frozen": frozen(plan["frozen"]),
        "rates": [] if map_ is None else [share(rate) for rate in map_["rates"]],
        "heat_rows": heat_rows(map_),
        "lines": [(name, CURVES[name]) for name in lines],
        "wanted": join(
            "" if tolerance is None else f"a drop of {share(tolerance)} at most",
            "" if asked["saving"] is None else f"{share(asked['saving'])} saved",
        ),
        "meaning": MEANING.items(),
        "charts": charts,
    }


def write_report(told: Told, path: Path) -> None:
    """Write the page for a run to `path`, whole or not at all."""
    with atomic(path) as draft:
        draft.write_text(page.render("strop.prune", "prune", told, view), encoding="utf-8")
