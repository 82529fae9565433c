"""From measured rows to a choice: what dominates what, and which recipe the objective prefers.

A gain in speed counts only where the interval of its ratio leaves out 1, so that noise is no reason to leave
the model as it is.
"""

from math import sqrt
from typing import Any

from strop.recipe import AS_IS

Row = dict[str, Any]

OBJECTIVES = ("memory", "speed", "balanced", "ttft")


def score(row: Row, objective: str) -> float | None:
    """Lower is better; None for what was not measured. `balanced` is the geometric mean of both ratios."""
    if row["status"] != "measured":
        return None
    memory, step = row["memory"]["ratio"], step_ratio(row)
    scores = {"memory": memory, "speed": step, "balanced": sqrt(memory * step), "ttft": first_ratio(row)}
    return scores[objective]


def step_ratio(row: Row) -> float:
    """Time per token over the baseline's; 1 for the baseline itself, and where a gain is not clear."""
    return _clear(row, "step_ratio")


def first_ratio(row: Row) -> float:
    """The same of the time to the first token."""
    return _clear(row, "ttft_ratio")


def _clear(row: Row, which: str) -> float:
    ratio, _, high = row["speed"].get(which) or (1.0, 1.0, 1.0)
    if row["label"] == AS_IS:
        return 1.0
    return ratio if high < 1 else max(ratio, 1.0)


def costs(row: Row) -> tuple[float, float, float]:
    """Memory ratio, step-time ratio, upper limit of the drop: what dominance compares."""
    return row["memory"]["ratio"], step_ratio(row), row["quality"]["drop_hi"]


def dominates(one: Row, other: Row) -> bool:
    """Whether `one` is nowhere worse than `other`, and somewhere better.

    What shares pages is for the first token, whose time counts wherever one of the two does.
    """
    pairs = list(zip(costs(one), costs(other), strict=True))
    if one.get("reuse") or other.get("reuse"):
        pairs.append((first_ratio(one), first_ratio(other)))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def judge(rows: list[Row], objective: str, max_drop: float) -> Row:
    """Fill in score, frontier and choice of every row in place; returns the chosen row.

    `rows[0]` is the baseline, which is always within the drop and chosen when nothing beats it.
    """
    measured = [row for row in rows if row["status"] == "measured"]
    for row in rows:
        ok = row in measured
        rival = next((other for other in measured if dominates(other, row)), None) if ok else None
        row["score"] = score(row, objective)
        row["within_drop"] = ok and (row is rows[0] or row["quality"]["drop_hi"] <= max_drop)
        row["dominated_by"] = rival["label"] if rival else None
        row["on_frontier"] = ok and rival is None
        row["chosen"] = False
    allowed = [row for row in measured if row["within_drop"]]
    best = min(allowed, key=lambda row: row["score"]) if allowed else rows[0]
    best["chosen"] = True
    return best
