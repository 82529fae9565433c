"""Measure what pruned channels are worth on a CPU: bundled spiking models under a plan, and SDT-v2.

    OMP_NUM_THREADS=1 python docs/measure_prune.py       # writes docs/results/prune-speed.json
    python zoo/train_svit.py --out runs/cluttered --cluttered --device cuda
    python docs/measure_prune.py --planned runs/cluttered --device cuda \\
        --out docs/results/prune-cluttered.json

Dense and cut models run in turns in one process. `--planned` measures what planners find for models of
cluttered digits, a folder each: accuracy on the part that a plan is made on and on one that nothing has seen.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from gpu_bench import TINY
from gpu_prune import SHAPES, beside, measure
from measure_gpu import Results, run

from strop.models.spiking_saved import from_folder
from strop.models.zoo import zoo_path
from strop.prune import PrimeSVT, PSViT, Uniform, reestimate, trace
from strop.tasks.digits import CLUTTERED, EVENTS, accuracy, digits, recordings

BENCH = dataclasses.replace(TINY, rounds=9, warm=1)
IMAGES = 64
"""Of a batch of digits."""


def rows() -> Iterator[tuple[str, object]]:
    """Bundled models without a quarter and half of their parameters, then SDT-v2 with random weights."""
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


def planners() -> dict[str, object]:
    """Who plans, by name; `None` is a uniform rate that saves what PSViT does."""
    return {
        "psvit": PSViT(round_to=8),
        "primesvt": PrimeSVT(round_to=8, mode="maximise"),
        "primesvt reserve 0.5": PrimeSVT(round_to=8, mode="maximise", reserve=0.5),
        "uniform all": None,
    }


def planned(folder: Path, device: str) -> Iterator[tuple[str, object]]:
    """Every planner on one model of cluttered digits."""
    dense = from_folder(folder).to(device).eval()
    seen, unseen = (recordings(part, CLUTTERED) for part in ("plan", "test"))
    statistics = recordings("train", CLUTTERED, 1).images[:1024].to(device)
    units = trace(dense)
    saved: dict[str, float] = {}

    def row(name: str, method: PSViT | PrimeSVT | None) -> dict:
        method = method or Uniform(round_to=8, where="all").matching(saved["psvit"], units, dense)
        start = time.perf_counter()
        plan = method.plan_units(units, dense, lambda model: accuracy(model, seen))
        saved[name] = plan.saving
        thin = plan.apply(dense, units)
        return {
            "model": str(folder),
            "saving": plan.saving,
            "dense": [accuracy(dense, seen), accuracy(dense, unseen)],
            "thin": [accuracy(thin, seen), accuracy(thin, unseen)],
            "reestimated": accuracy(reestimate(thin, statistics.split(256)), unseen),
            "evaluations": plan.evaluations,
            "seconds": time.perf_counter() - start,
        }

    for name, method in planners().items():
        yield f"planned {folder.name} {name}", partial(row, name, method)


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "prune-speed.json")
    parser.add_argument("--planned", type=Path, nargs="+", metavar="DIR", help="models of cluttered digits")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    asked = (
        (row for folder in args.planned for row in planned(folder, args.device)) if args.planned else rows()
    )
    with torch.no_grad():
        run(asked, Results(args.out), float("inf"))


if __name__ == "__main__":
    main()
