"""The tables of docs/fleet.md: how fast the simulator is."""

from collections.abc import Callable
from statistics import median
from typing import Any

from report_speed import measured_on, table


def clock(results: dict[str, Any]) -> str:
    """Events a second of the bare clock."""
    ways = [name for name in results["clock"][0] if name != "pending"]
    lines = [[str(row["pending"]), *(_rates(row[name]) for name in ways)] for row in results["clock"]]
    return table(["events pending", *(f"{name}, M events/s" for name in ways)], lines)


def runs(results: dict[str, Any]) -> str:
    """One trace on 64 GPUs under each policy."""
    lines = [
        [
            row["policy"],
            f"{median(row['seconds']):.2f} ({min(row['seconds']):.2f} to {max(row['seconds']):.2f})",
            f"{row['per_second']:,.0f}",
            f"{row['events']:,}",
        ]
        for row in results["runs"]
    ]
    head = ["policy", "CPU seconds", "requests a second", "events"]
    first = results["runs"][0]
    said = f"{first['requests']:,} requests of {results['trace']} on {first['gpus']} GPUs."
    return f"{table(head, lines)}\n\n{said}"


def sizes(results: dict[str, Any]) -> str:
    """Fleets and traces that grow together."""
    lines = [
        [
            f"{row['gpus']:,}",
            f"{row['requests']:,}",
            f"{median(row['seconds']):.1f}",
            f"{1e6 * median(row['seconds']) / row['requests']:.0f}",
        ]
        for row in results["sizes"]
    ]
    head = ["GPUs", "requests", "CPU seconds", "microseconds a request"]
    said = f"`python docs/measure_fleet.py`, under netkv. {measured_on(results['machine'])}"
    return f"{table(head, lines)}\n\n{said}"


def _rates(values: list[float]) -> str:
    return f"{median(values) / 1e6:.2f} ({min(values) / 1e6:.2f} to {max(values) / 1e6:.2f})"


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "fleet-clock": ("fleet.json", clock),
    "fleet-runs": ("fleet.json", runs),
    "fleet-sizes": ("fleet.json", sizes),
}
