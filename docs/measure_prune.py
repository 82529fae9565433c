"""Measure on a CPU what pruned channels are worth: the bundled spiking models under a plan, SDT-v2 at its size.

    OMP_NUM_THREADS=1 python docs/measure_prune.py       # writes docs/results/prune-speed.json

Dense and cut models run in turns in one process.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from gpu_bench import TINY
from gpu_prune import SHAPES, beside, measure
from measure_gpu import Results, run

from strop.models.spiking_saved import from_folder
from strop.models.zoo import zoo_path
from strop.prune import Uniform, trace
from strop.tasks.digits import EVENTS, digits, recordings

BENCH = dataclasses.replace(TINY, rounds=9, warm=1)
IMAGES = 64
"""Of a batch of digits."""


def rows() -> Iterator[tuple[str, object]]:
    """The bundled models with a quarter and half of their parameters gone, then SDT-v2 with random weights."""
    for name, saving in ((n, s) for n in ("svit-digits", "svit-events") for s in (0.25, 0.5)):
        yield f"prune {name} by {saving:.0%} batch {IMAGES}", partial(bundled, name, saving)
    name = "SDT-v2 15.1M"
    for saving in (0.25, 0.5):
        yield f"prune {name} by {saving:.0%} batch 1", partial(measure, BENCH, *SHAPES[name], saving, 1, 8)


def bundled(name: str, saving: float) -> dict:
    """One row of a bundled model."""
    dense = from_folder(zoo_path(name)).eval()
    held = recordings("test", EVENTS) if "events" in name else digits("test")
    units = trace(dense)
    method = Uniform().matching(saving, units, dense)
    plan = method.plan_units(units, dense)
    return {"saving": plan.saving, "rate": method.rate} | beside(
        BENCH, dense, plan.apply(dense, units), held.images[:IMAGES]
    )


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "prune-speed.json")
    args = parser.parse_args()
    with torch.no_grad():
        run(rows(), Results(args.out), float("inf"))


if __name__ == "__main__":
    main()
