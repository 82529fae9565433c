"""Sums over tokens of two feature activations, from which correlations follow: one pass, float64.

Rows of `sums` `[G, 8, m]` are sum x, sum y, sum x^2, sum y^2, sum xy, tokens with x > 0, with y > 0, with
both, for each of G folds of the tokens. `peaks` `[G, 2, m]` and `places` `[G, 2, m]` hold the largest x and y
of each fold and the number of the token where it first stood. Features are not below 0, and mostly 0.
"""

import sys
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

SUMS = ("x", "y", "xx", "yy", "xy", "fires_x", "fires_y", "both")


@lru_cache(maxsize=8)
def kernels(device_type: str) -> ModuleType:
    """The module whose functions serve a device type: numba's on a CPU, else this one."""
    return import_module("strop.kernels.moments_numba") if device_type == "cpu" else sys.modules[__name__]


def accumulate(
    x: Tensor, y: Tensor, folds: Tensor, first: int, sums: Tensor, peaks: Tensor, places: Tensor
) -> None:
    """Add tokens to the sums, in place.

    `x` and `y` `[T, m]` float32, `folds` `[T]` int64 says where each token counts, `first` is the number of
    the first token.
    """
    for fold in folds.unique().tolist():
        index = (folds == fold).nonzero()[:, 0]
        one, other = x[index].double(), y[index].double()
        fires, also = one > 0, other > 0
        parts = (one, other, one**2, other**2, one * other, fires, also, fires & also)
        sums[fold] += torch.stack([part.sum(0, dtype=torch.float64) for part in parts])
        for side, values in enumerate((x[index], y[index])):
            peak, at = values.max(0)
            higher = peak > peaks[fold, side]
            places[fold, side] = torch.where(higher, first + index[at], places[fold, side])
            peaks[fold, side] = torch.where(higher, peak, peaks[fold, side])
