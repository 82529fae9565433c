"""What became of features as plain data: shares, the features most damaged with their texts, pictures."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from strop.audit.survival import DAMAGED, SURVIVED, Survival, snippets

WORST = 12
"""Features whose texts are shown."""
TEXTS = 3
"""Texts of a feature, on each side."""
AROUND = 12
"""Tokens shown on each side of the one that fires."""
BINS = 40
"""Bars of the distribution."""
POINTS = 4_000
"""Features in a picture, at most."""
GROUPS = 10
"""Equal groups of features by firing rate and by peak."""


def study(found: Survival, rows: Tensor, skip: int, tokenizer: Any) -> dict[str, Any]:
    """All that a report says of one audit, without the models' names."""
    table = found.table()
    varies = np.isfinite(table["rho"])
    judged = {name: values[varies] for name, values in table.items()}
    tokens = int(found.stream.tokens.sum())
    return {
        "survival": {name: list(value) for name, value in found.shares().items()},
        "loss": found.loss(),
        "features": {
            "all": len(found.rho),
            "active": len(varies),
            "constant": int((~varies).sum()),
            "rate": float(table["rate"].mean()),
            "f1": float(np.median(table["f1"])),
            "rho_firing": _median(table["rho_firing"]),
            "silent_before": int((found.sums.fires_x == 0).sum()),
            "silent_after": int(((found.sums.fires_y == 0) & (found.sums.fires_x > 0)).sum()),
        },
        "regime": {"tokens": tokens, "sequences": len(rows), "length": rows.shape[1]},
        "worst": list(_worst(found, judged, rows, skip, tokenizer)),
        "histogram": _histogram(judged["rho"]),
        "deciles": {name: _groups(judged[name], judged["rho"]) for name in ("rate", "peak")},
        "points": _points(judged),
    }


def _median(values: np.ndarray) -> float:
    """Of those that are numbers; not a number where none is."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _worst(
    found: Survival, table: dict[str, np.ndarray], rows: Tensor, skip: int, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """The features with the least correlation, those that did not survive."""
    order = np.argsort(table["rho"], kind="stable")[:WORST]
    for place in order[table["rho"][order] <= SURVIVED]:
        feature = int(table["feature"][place])
        sides = {
            side: [
                {"strength": strength} | _marked(rows[row].tolist(), at, skip, tokenizer)
                for row, at, strength in snippets(found, rows, feature, skip, index, TEXTS)
            ]
            for index, side in enumerate(("before", "after"))
        }
        yield {name: float(values[place]) for name, values in table.items()} | {"feature": feature} | sides


def _marked(ids: Sequence[int], at: int, skip: int, tokenizer: Any) -> dict[str, str]:
    """The text around a token, and the token."""
    first = max(at - AROUND, skip)
    parts = {"left": ids[first:at], "token": ids[at : at + 1], "right": ids[at + 1 : at + 1 + AROUND]}
    return {name: tokenizer.decode(part) for name, part in parts.items()}


def _histogram(rho: np.ndarray) -> dict[str, list[float]]:
    """How many features have which correlation; bars end at the thresholds, negative ones share the first."""
    counts, edges = np.histogram(rho.clip(0, 1), bins=BINS, range=(0, 1))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _groups(by: np.ndarray, rho: np.ndarray) -> list[dict[str, float]]:
    """Shares that survived and are damaged among equal groups of features, from the least of `by`."""
    order = np.argsort(by, kind="stable")
    return [
        {
            "low": float(by[part].min()),
            "high": float(by[part].max()),
            "features": len(part),
            "survived": float((rho[part] > SURVIVED).mean()),
            "damaged": float((rho[part] < DAMAGED).mean()),
        }
        for part in np.array_split(order, GROUPS)
        if len(part)
    ]


def _points(table: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Features of a picture, evenly picked where there are too many."""
    count = len(table["rho"])
    picked = np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(int))
    names = ("feature", "rho", "rate", "peak")
    return {name: [float(f"{value:.4g}") for value in table[name][picked]] for name in names}
