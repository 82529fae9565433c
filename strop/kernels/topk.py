"""Keep the k largest of each row, and make the rest 0: what a TopK autoencoder does at every token."""

import sys
from functools import lru_cache
from importlib import import_module
from types import ModuleType

from torch import Tensor


@lru_cache(maxsize=8)
def kernels(device_type: str) -> ModuleType:
    """The module whose functions serve a device type: numba's on a CPU, else this one."""
    return import_module("strop.kernels.topk_numba") if device_type == "cpu" else sys.modules[__name__]


def keep_largest(values: Tensor, k: int) -> Tensor:
    """`values` `[T, m]` float32, in place: the k largest of each row where above 0, and 0 elsewhere.

    Among equals any may stay.
    """
    kept, index = values.topk(k, dim=-1, sorted=False)
    return values.zero_().scatter_(-1, index, kept.relu_())
