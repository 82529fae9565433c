"""The tables of docs/prune.md: what pruned channels are worth in time and memory."""

from collections.abc import Callable
from typing import Any

from report_speed import measured_on, table


def cost(results: dict[str, Any], command: str) -> str:
    """Dense and cut models in turns."""
    lines = []
    for row in results["rows"]:
        ratio, low, high = row["ratio"]
        lines.append(
            [
                row["name"].removeprefix("prune "),
                f"{100 * row['saving']:.1f} %",
                " to ".join(f"{row['bytes'][which] / 1e6:.3g}" for which in ("dense", "thin")),
                " to ".join(f"{row['ms'][which]:.3g}" for which in ("dense", "thin")),
                f"{ratio:.2f} ({low:.2f} to {high:.2f})",
                f"{row['peak']['thin'] / row['peak']['dense']:.2f}",
            ]
        )
    head = ["case", "saved", "MB of weights", "ms a pass", "/ dense (95 %)", "peak memory / dense"]
    return f"{table(head, lines)}\n\n`{command}`. {measured_on(results['machine'])}"


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "prune-cpu": ("prune-speed.json", lambda results: cost(results, "python docs/measure_prune.py")),
    "prune-gpu": ("gpu-prune.json", lambda results: cost(results, "make gpu")),
}
