"""Measure kernels and caches on a CUDA device at the shapes of real models, whose weights are random.

    python docs/measure_gpu.py                    # everything, into docs/results/gpu-*.json
    python docs/measure_gpu.py --only decode,serve --seconds 120
    python docs/measure_gpu.py --tiny             # on a CPU, in Triton's interpreter: does it run?

A row is written as soon as it is measured and not measured again, so a run that was cut off goes on when it
is started again. A part starts no row after `--seconds`.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

PARTS = {
    "encode": ("gpu_kernels", "gpu-kvarn.json"),
    "decode": ("gpu_kernels", "gpu-kvarn.json"),
    "evict": ("gpu_kernels", "gpu-evict.json"),
    "serve": ("gpu_serving", "gpu-evict.json"),
    "verify": ("gpu_speculation", "gpu-speculation.json"),
    "speculate": ("gpu_speculation", "gpu-speculation.json"),
    "prune": ("gpu_prune", "gpu-prune.json"),
    "paged": ("gpu_paged", "gpu-paged.json"),
}
"""Which module measures a part, and where its rows go."""


class Results:
    """Rows of measurements by name, in one JSON file."""

    def __init__(self, path: Path) -> None:
        """The rows that `path` holds already, if they are of this device."""
        from strop.core.machine import machine

        self.path, self.machine, self.rows = path, machine(), {}
        if path.exists():
            known = json.loads(path.read_text())
            if known["machine"]["gpu"] == self.machine["gpu"]:
                self.rows = {row["name"]: row for row in known["rows"]}

    def add(self, row: dict) -> None:
        """Keep a row."""
        from strop.core.files import atomic

        self.rows[row["name"]] = row
        with atomic(self.path) as file:
            file.write_text(json.dumps({"machine": self.machine, "rows": [*self.rows.values()]}, indent=1))


def run(rows: Iterator[tuple[str, Callable[[], dict]]], results: Results, seconds: float) -> bool:
    """Measure the rows that are missing, until the time is up; whether none of them broke."""
    import torch

    until, left, broken = time.monotonic() + seconds, 0, False
    for name, measure in rows:
        if name in results.rows:
            continue
        if time.monotonic() > until:
            left += 1
            continue
        try:
            row = measure()
        except torch.OutOfMemoryError:
            row = {"failed": "out of memory"}
        except Exception:
            broken = True
            print(f"{name}: {traceback.format_exc()}", flush=True)
            continue
        results.add({"name": name, **row})
        print(json.dumps(results.rows[name]), flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if left:
        print(f"{left} rows are left: run this again", flush=True)
    return not broken


def main() -> None:
    """Measure all that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by comma: " + ", ".join(PARTS))
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of results"
    )
    parser.add_argument("--seconds", type=float, default=170, help="time after which a part starts no row")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU")
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if args.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

    import torch

    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device is visible: run this on a machine with an NVIDIA GPU, or with --tiny")
    bench = import_module("gpu_bench")
    sound = True
    with torch.no_grad():
        for part in parts:
            module, file = PARTS[part]
            rows = getattr(import_module(module), part)(bench.TINY if args.tiny else bench.REAL)
            sound &= run(rows, Results(args.out / file), args.seconds)
    sys.exit(not sound)


if __name__ == "__main__":
    main()
