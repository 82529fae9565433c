"""Time linear layers whose weights are packed codes, beside the same layers with a dense matrix.

    OMP_NUM_THREADS=1 python docs/measure_linear.py --out docs/results/linear.json

For every shape, dtype and number of rows the dense layer, the kernel that multiplies by the codes and the
product with a dequantized matrix take turns, for `ROUNDS` rounds of `SECONDS` or one call each. A time is the
least of all rounds, and ratios are of these to that of the dense layer.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from strop.core.files import atomic
from strop.core.machine import machine
from strop.kernels import linear_numba
from strop.weights.grid import Grid, round_to_nearest
from strop.weights.linear import PackedLinear

SHAPES = ((128, 256), (768, 256), (256, 768), (1024, 1024), (4096, 4096))
"""Outputs and inputs: three of zoo:coder, two of larger models."""
GRIDS = (Grid(8), Grid(4, 128), Grid(4, 32, False), Grid(3, 128), Grid(2, 128), Grid(1, 128))
ROWS = (1, 4, 16, 64)
ROUNDS, SECONDS = 9, 0.002


def by_kernel(layer: PackedLinear, x: Tensor) -> Tensor:
    """The product by codes, at any number of rows."""
    return linear_numba.multiply(x, layer.packed, layer.scale, layer.zero, None, layer.grid.bits)


def by_matrix(layer: PackedLinear, x: Tensor) -> Tensor:
    """The product with the dequantized matrix, at any number of rows."""
    return F.linear(x, layer.weight)


def seconds(call: Callable[[], Tensor], times: int) -> float:
    """Time of one call among so many."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def timed(dtype: torch.dtype, shape: tuple[int, int], count: int) -> list[dict]:
    """One row a grid."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(1, count, shape[1], generator=generator).to(dtype)
    dense = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    dense.weight.copy_(weight)
    calls: dict[tuple, Callable[[], Tensor]] = {("dense", None): lambda: dense(x)}
    for grid in GRIDS:
        layer = PackedLinear(round_to_nearest(weight, grid), grid)
        calls["kernel", grid] = lambda layer=layer: by_kernel(layer, x)
        calls["matrix", grid] = lambda layer=layer: by_matrix(layer, x)
    for call in calls.values():
        call()
    times = {name: int(SECONDS / seconds(call, 2)) + 1 for name, call in calls.items()}
    rounds = [{name: seconds(call, times[name]) for name, call in calls.items()} for _ in range(ROUNDS)]

    least = {name: 1e6 * min(one[name] for one in rounds) for name in calls}
    base = least["dense", None]
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "outputs": shape[0],
            "inputs": shape[1],
            "rows": count,
            "grid": str(grid),
            "dense_us": round(base, 1),
            "kernel_us": round(least["kernel", grid], 1),
            "kernel_ratio": round(least["kernel", grid] / base, 3),
            "matrix_ratio": round(least["matrix", grid] / base, 3),
        }
        for grid in GRIDS
    ]


@torch.no_grad()
def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = [
        (dtype, shape, count)
        for dtype in (torch.bfloat16, torch.float32)
        for shape in SHAPES
        for count in ROWS
    ]
    rows = [row for case in track(plan, description="products") for row in timed(*case)]
    with atomic(args.out) as file:
        file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
