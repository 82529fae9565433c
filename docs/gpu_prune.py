"""What pruned channels are worth in time and memory, at SDT-v2's shapes: dense and cut models in turns.

Weights are random, since nothing that is measured depends on them: bytes of parameters, the median time of a
forward pass, and the most memory that one takes beyond what was there before.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from statistics import median

import numpy as np
import torch
from gpu_bench import Bench, wall
from torch import nn

from strop.audit.memory import peak_bytes, reset_peak
from strop.core.heap import trim
from strop.core.intervals import bootstrap
from strop.models.spiking_config import SpikingConfig
from strop.models.spiking_vit import SpikingTransformer
from strop.prune import Uniform, trace

SHAPES = {
    "SDT-v2 15.1M": (SpikingConfig.sdt_v2(), 224),
    "SDT-v2 55.4M": (SpikingConfig.sdt_v2((128, 256, 512, 640)), 224),
    "SDT 8-384 16.8M": (SpikingConfig.sdt(8, 384), 224),
}
SMALL = SpikingConfig.sdt_v2((8, 16, 16, 16), depths=(1, 1, 1, 1, 1), heads=2, classes=10)
SAVINGS, BATCHES, ROUND_TO = (0.25, 0.5), (1, 64), 8


def prune(bench: Bench) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Every shape, share of the parameters that goes, and batch."""
    real = bench.device == "cuda"
    shapes = SHAPES if real else {"SDT-v2 small": (SMALL, 32)}
    for name, saving, batch in product(shapes, SAVINGS, BATCHES if real else (1,)):
        config, side = shapes[name]
        yield (
            f"prune {name} by {saving:.0%} batch {batch}",
            partial(measure, bench, config, side, saving, batch, ROUND_TO if real else 1),
        )


def measure(bench: Bench, config: SpikingConfig, side: int, saving: float, batch: int, round_to: int) -> dict:
    """One row: a model of random weights beside itself with a rate for all blocks that saves so much."""
    torch.manual_seed(0)
    dense = SpikingTransformer(config).to(bench.device, bench.dtype).eval()
    units = trace(dense)
    method = Uniform(rate=0.1, round_to=round_to).matching(saving, units, dense)
    plan = method.plan_units(units, dense)
    thin = plan.apply(dense, units)
    images = bench.normal(batch, config.channels, side, side)
    return {"saving": plan.saving, "rate": method.rate} | beside(bench, dense, thin, images)


def beside(bench: Bench, dense: nn.Module, thin: nn.Module, images: torch.Tensor) -> dict:
    """Bytes, milliseconds in turns, and peak memory of both; ratios are thin over dense."""
    models = {"dense": dense, "thin": thin}
    for model in models.values():
        for _ in range(max(bench.warm, 1)):
            model(images)
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(max(bench.rounds, 5)):
        for name in list(models)[:: 1 if round_ % 2 else -1]:
            times[name].append(wall(bench, partial(models[name], images)))
    pairs = np.array([times["thin"], times["dense"]]).T
    ratio = bootstrap(pairs, lambda sample: np.median(sample[..., 0] / sample[..., 1], axis=1))
    return {
        "bytes": {name: sum(p.nbytes for p in model.parameters()) for name, model in models.items()},
        "ms": {name: median(found) for name, found in times.items()},
        "ratio": ratio,
        "peak": {name: peak(bench, model, images) for name, model in models.items()},
    }


def peak(bench: Bench, model: nn.Module, images: torch.Tensor) -> int:
    """Bytes at the height of a forward pass beyond those before it."""
    trim()
    device = torch.device(bench.device)
    reset_peak(device)
    before = peak_bytes(device)
    model(images)
    return peak_bytes(device) - before
