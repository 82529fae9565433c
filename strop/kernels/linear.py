"""x W^T for few rows x, where W is packed codes: what kernels offer, when they serve, and the twin in torch.

At one token a step a linear layer takes as long as its matrix takes to read, and codes are the smaller one to
read. With many rows the arithmetic decides, and a dense product of the dequantized matrix is faster.
"""

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.core.bits import unpack

ROWS = 16
"""Most rows that kernels are given. At 16 they take at most three quarters of the time of dequantizing; at 64
some take longer (docs/results/linear.json)."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kernels(Protocol):
    """What a module of kernels offers."""

    def supports(self, inputs: int, group: int) -> bool:
        """Whether a matrix `[O, inputs]` with a scale every `group` inputs is served; the twin serves all."""
        ...

    def multiply(
        self, x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int
    ) -> Tensor:
        """As the twin, up to the rounding of float32 sums; a row's result does not depend on other rows."""
        ...


@lru_cache(maxsize=8)
def kernels(device_type: str) -> Kernels | None:
    """The kernels for a device type, None where there are none or their compiler is not installed."""
    if device_type != "cpu" or find_spec("numba") is None:
        return None
    return import_module("strop.kernels.linear_numba")


def multiply(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """Map `x` `[..., I]` to `[..., O]` in its dtype, by float32 arithmetic that is rounded once.

    `packed` `[O, I * bits / 8]` uint8 is made by `strop.core.bits.pack`; `scale` and `zero` `[O, I / group]`
    and `bias` `[O]` have the dtype of `x`. A weight is (code - zero) * scale, and zero is the middle of the
    codes where it is None.
    """
    codes = unpack(packed, bits).float().unflatten(-1, (scale.shape[-1], -1))
    middle = (0.5 if bits == 1 else 2 ** (bits - 1)) if zero is None else zero.float().unsqueeze(-1)
    weight = ((codes - middle) * scale.float().unsqueeze(-1)).flatten(-2)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def serving(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Kernels | None:
    """The kernels that serve this product, None where the matrix is to be dequantized.

    They serve up to `ROWS` rows of plain CPU tensors of one dtype, outside of autograd and torch.compile.
    """
    if not (x.is_cpu and packed.is_cpu and scale.is_cpu) or type(x) is not Tensor:
        return None
    inputs, dtype = x.shape[-1], x.dtype
    if x.numel() > ROWS * inputs or packed.shape[-1] * 8 != bits * inputs:
        return None
    if dtype is not scale.dtype or dtype not in DTYPES or torch.compiler.is_compiling():
        return None
    if bias is not None and not (bias.is_cpu and bias.dtype is dtype):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    found = kernels("cpu")
    return found if found is not None and found.supports(inputs, inputs // scale.shape[-1]) else None
