"""Leaky integrate-and-fire neurons, run over the steps of a layer at once.

A neuron integrates its input, fires a spike of 1 at its threshold, and starts again from 0. Spikes have no
useful derivative, so that of a sigmoid stands in for it. Charging by decayed input, hard reset and a reset
without gradient are those of the spiking transformers (arXiv 2307.01694, 2404.03663).

Left out: learned time constants, soft resets, and the integer neuron of E-SpikeFormer (arXiv 2411.16061).
"""

from typing import Any

import torch
from torch import Tensor, nn

from strop.core.errors import StropError

SHARPNESS = 4.0
"""Alpha of the sigmoid whose derivative stands in for that of a spike."""


class LIF(nn.Module):
    """Spikes `[T, ...]` of input currents `[T, ...]`; the membrane starts at 0 in every call.

    At each step h = v + (x - v) / tau, a spike where h >= threshold, and v = 0 there and h elsewhere. The
    membrane is float32 at least, whatever the input is; spikes, 0 or 1, have the input's dtype.
    """

    def __init__(self, threshold: float = 1.0, tau: float = 2.0) -> None:
        super().__init__()
        if not (threshold > 0 and tau >= 1):
            raise StropError(
                f"a neuron's threshold is above 0 and its tau at least 1, got threshold={threshold!r} and "
                f"tau={tau!r}"
            )
        self.threshold, self.tau = threshold, tau

    def forward(self, current: Tensor) -> Tensor:
        return _Fire.apply(current, self.threshold, self.tau)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, tau={self.tau}"


class _Fire(torch.autograd.Function):
    """The steps of a layer, and their gradient from membranes alone: less memory than a recorded loop."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, threshold: float, tau: float) -> Tensor:
        wide = current.to(torch.promote_types(current.dtype, torch.float32))
        membrane = torch.zeros_like(wide[0])
        charged, fired = [], []
        for x in wide.unbind():
            charged.append(membrane + (x - membrane) / tau)
            fired.append(charged[-1] >= threshold)
            membrane = charged[-1].masked_fill(fired[-1], 0)
        ctx.threshold, ctx.tau = threshold, tau
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.stack(charged))
        return torch.stack(fired).to(current.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (charged,) = ctx.saved_tensors
        direct = grads[0].to(charged.dtype)
        later = torch.zeros_like(charged[0])
        found = []
        for t in reversed(range(len(charged))):
            above = charged[t] - ctx.threshold
            of_h = direct[t] * slope(above) + later.masked_fill(above >= 0, 0)
            found.append(of_h / ctx.tau)
            later = of_h - found[-1]
        return torch.stack(found[::-1]).to(grads[0].dtype), None, None


def slope(above: Tensor) -> Tensor:
    """What stands in for a spike's derivative where the membrane is `above` its threshold: 1 at 0."""
    sigmoid = (SHARPNESS * above).sigmoid()
    return (1 - sigmoid) * sigmoid * SHARPNESS
