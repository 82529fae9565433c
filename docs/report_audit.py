"""The tables of docs/audit.md: what changes leave of features, and what an audit takes."""

from collections.abc import Callable
from typing import Any

from report_speed import measured_on, table

MIB = 1 << 20


def changes(results: dict[str, Any]) -> str:
    """Every change of every model that the claims read, the dearest last."""
    claims = [claim for claim in results["claims"] if claim["paper"] == "sae-survival"]
    found = {
        (row["model"], row["change"]): row for claim in claims for row in claim["details"] if "slot" in row
    }
    if not found:
        return "not measured yet"
    rows = sorted(found.values(), key=lambda row: (row["model"], _mean(row["loss_rise"])))
    lines = [
        [
            row["model"],
            row["change"],
            row["slot"],
            f"{_mean(row['loss_rise']):+.4f}",
            _share(row["survived"]),
            f"{_mean(row['damaged']):.1%}",
            f"{_mean(row['f1']):.3f}",
            f"{_mean(row['survived_firing']):.1%}",
        ]
        for row in rows
    ]
    head = ["model", "change", "slot", "loss, nats", "survived", "damaged", "F1", "survived where firing"]
    where = measured_on(results["machines"]["sae-survival"])
    return f"{table(head, lines)}\n\n`strop claims sae-survival`. {where}"


def cost(results: dict[str, Any]) -> str:
    """What an audit takes beside the two forward passes that it needs."""
    lines = [
        [
            row["dtype"],
            f"{row['bare_us']:.0f} us",
            f"{row['audit_us']:.0f} us",
            f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f}; "
            f"{len(row['ratios'])})",
        ]
        for row in results["time"]
    ]
    head = ["dtype", "two passes, a token", "audit, a token", "ratio (least to most, rounds)"]
    peaks = ", ".join(
        f"{row['peak_bytes'] / MIB:.0f} MiB at {row['tokens']:,} tokens" for row in results["memory"]
    )
    return (
        f"{table(head, lines)}\n\nMost memory of the process: {peaks}.\n\n"
        f"`python docs/measure_audit.py`, zoo:coder, {results['features']:,} features of width "
        f"{results['width']}. {measured_on(results['machine'])}"
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _share(values: list[float]) -> str:
    return f"{_mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "audit-changes": ("claims.json", changes),
    "audit-cost": ("audit.json", cost),
}
