"""The Sylvester-Hadamard rotation: orthonormal, symmetric, its own inverse."""

from functools import lru_cache

import torch
from torch import Tensor

from strop.core.errors import StropError


@lru_cache(maxsize=32)
def hadamard(dim: int, device: torch.device | str = "cpu") -> Tensor:
    """H / sqrt(D), `[D, D]` float32; one tensor for all callers, so leave it as it is.

    Raises StropError unless `dim` is a power of two: the Sylvester construction knows no other size.
    """
    if dim < 1 or dim & (dim - 1):
        raise StropError(
            f"head size {dim} is not a power of two, which the Hadamard rotation needs: "
            "use a method without rotation (kivi) for this model"
        )
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, device=device)
        while matrix.shape[0] < dim:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix / dim**0.5


def rotate(x: Tensor) -> Tensor:
    """Rotate the last dimension of `x` `[..., D]` (float32); applying it twice gives `x` back."""
    return x @ hadamard(x.shape[-1], x.device)
