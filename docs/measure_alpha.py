"""Time the spectral exponent on a CPU, beside weightwatcher's, and compare how both rank known spectra.

    OMP_NUM_THREADS=1 PYTHONPATH=. .peers/weightwatcher/bin/python docs/measure_alpha.py \
        --out docs/results/alpha.json

weightwatcher runs in an environment of its own (pip install weightwatcher), which needs what strop.weights
imports as well. `speed` takes one matrix by each estimator in turn before the next; weightwatcher's is
`analyze()` on a model of one linear layer with all settings at their defaults. `throughput` takes `EXPERTS`
matrices of each of Qwen3-30B-A3B's expert shapes in bfloat16, in one thread and in two by turns, of which the
fastest counts, and `extrapolated` says how long its 18,432 would take at that pace; the 768 of 512 x 512 are
all taken. `load` is how many processes waited for the cores meanwhile: above their number, trust ratios and
processor time. `ranking` is Spearman's correlation on matrices of known exponents, of one shape or of three:
`spectrum` plants power-law eigenvalues in random bases, `entries` draws weights from Student's distribution.
"""

import argparse
import itertools
import json
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from weightwatcher import WeightWatcher

from strop.core.files import atomic
from strop.core.machine import machine, version
from strop.weights.spectrum import hill, spectral_alpha

ROUNDS = 16
EXPERTS, TURNS = 16, 8
MODEL = {(768, 2048): 2 * 48 * 128, (2048, 768): 48 * 128}
"""Expert matrices of Qwen3-30B-A3B: gate and up, and down."""
SMALL, SMALL_COUNT = (512, 512), 768
EXPONENTS, SEEDS = np.linspace(1.6, 6, 12), 5
SHAPES = {"equal": [(512, 512)], "mixed": [(512, 512), (1024, 512), (2048, 512)]}


def farms(weight: Tensor) -> float:
    """Tiles of 128, Hill over the largest tenth."""
    return spectral_alpha(weight).alpha


def whole(weight: Tensor) -> float:
    """Hill over the largest tenth of the whole matrix's spectrum."""
    return hill(torch.linalg.svdvals(weight).double().numpy() ** 2)


def weightwatcher(weight: Tensor) -> float:
    """The power-law fit of `analyze()` at its defaults."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return float(WeightWatcher(model=nn.Sequential(layer)).analyze()["alpha"].iloc[0])


ESTIMATORS: dict[str, Callable[[Tensor], float]] = {
    "farms": farms,
    "whole": whole,
    "weightwatcher": weightwatcher,
}


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor time."""
    start, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - busy


def speed(shape: tuple[int, int]) -> list[dict]:
    """One row an estimator: medians over rounds, and of the ratios within a round to FARMS."""
    weights = [0.02 * torch.randn(shape) for _ in range(ROUNDS + 1)]
    times = np.array(
        [
            [seconds(lambda each=each, weight=weight: each(weight)) for each in ESTIMATORS.values()]
            for weight in weights
        ]
    )[1:]
    ratios = times / times[:, :1]
    return [
        {
            "estimator": name,
            "shape": shape,
            "ms": 1000 * float(np.median(times[:, at, 0])),
            "cpu_ms": 1000 * float(np.median(times[:, at, 1])),
            "ratio": float(np.median(ratios[:, at, 0])),
            "cpu_ratio": float(np.median(ratios[:, at, 1])),
        }
        for at, name in enumerate(ESTIMATORS)
    ]


def throughput(shape: tuple[int, int], count: int, turns: int) -> list[dict]:
    """One row a number of threads: matrices a second of the fastest turn, and of processor time."""
    weights = [0.02 * torch.randn(shape).bfloat16() for _ in range(count)]
    times: dict[int, list] = {1: [], 2: []}
    for _, threads in itertools.product(range(turns), times):
        with ThreadPoolExecutor(threads) as pool:
            times[threads].append(seconds(lambda pool=pool: list(pool.map(farms, weights))))
    return [
        {
            "shape": shape,
            "threads": threads,
            "matrices": count,
            "seconds": min(found)[0],
            "per_second": count / min(found)[0],
            "per_cpu_second": count / float(np.median(found, 0)[1]),
        }
        for threads, found in times.items()
    ]


def extrapolated(rows: list[dict], threads: int, key: str) -> float:
    """Minutes for all experts of the model at the measured pace."""
    pace = {row["shape"]: row[key] for row in rows if row["threads"] == threads}
    return sum(count / pace[shape] for shape, count in MODEL.items()) / 60


def spectrum(shape: tuple[int, int], exponent: float, seed: int) -> Tensor:
    """A matrix with the quantiles of a density `lambda ** -exponent` as eigenvalues, in random bases."""
    generator, rank = torch.Generator().manual_seed(seed), min(shape)
    left, right = (torch.linalg.qr(torch.randn(side, rank, generator=generator))[0] for side in shape)
    return left * (torch.arange(1, rank + 1) / rank) ** (-0.5 / (exponent - 1)) @ right.T


def entries(shape: tuple[int, int], exponent: float, seed: int) -> Tensor:
    """Independent weights, whose largest squares have the density `w ** -exponent`."""
    drawn = np.random.default_rng(seed).standard_t(2 * (exponent - 1), shape)
    return torch.from_numpy(drawn).float()


FAMILIES = {"spectrum": spectrum, "entries": entries}


def ranking(family: str, kind: str) -> dict:
    """Spearman's correlation of each pair of estimators and with the planted exponent, over seeds."""
    found = []
    for seed in range(SEEDS):
        shapes = itertools.cycle(SHAPES[kind])
        weights = [FAMILIES[family](next(shapes), each, 100 * seed + at) for at, each in enumerate(EXPONENTS)]
        alphas = {name: [each(weight) for weight in weights] for name, each in ESTIMATORS.items()}
        found.append({"planted": EXPONENTS, **alphas})
    pairs = {}
    for left, right in itertools.combinations(found[0], 2):
        values = [float(spearmanr(each[left], each[right]).statistic) for each in found]
        pairs[f"{left}, {right}"] = {"mean": float(np.mean(values)), "least": min(values)}
    return {
        "family": family,
        "shapes": kind,
        "matrices": len(EXPONENTS),
        "seeds": SEEDS,
        "spearman": pairs,
    }


@torch.no_grad()
def main() -> None:
    """Measure everything and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    experts = [row for shape in MODEL for row in throughput(shape, EXPERTS, TURNS)]
    found = {
        "machine": machine(),
        "command": "OMP_NUM_THREADS=1 python " + shlex.join(sys.argv),
        "weightwatcher": {
            "version": version("weightwatcher"),
            "settings": "analyze() at its defaults: fit=PL, pl_package=ww, svd_method=fast",
        },
        "speed": [row for shape in (*MODEL, SMALL) for row in speed(shape)],
        "throughput": experts + throughput(SMALL, SMALL_COUNT, 1),
        "extrapolated": [
            {
                "model": "Qwen3-30B-A3B",
                "matrices": sum(MODEL.values()),
                "threads": threads,
                "minutes": extrapolated(experts, threads, "per_second"),
                "cpu_minutes": extrapolated(experts, threads, "per_cpu_second"),
            }
            for threads in (1, 2)
        ],
        "ranking": [ranking(family, kind) for family in FAMILIES for kind in SHAPES],
    }
    found["load"] = os.getloadavg()[0]
    with atomic(args.out) as file:
        file.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
