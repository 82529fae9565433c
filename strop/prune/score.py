"""Which channels of a unit matter: a score for each, and how many of the best stay.

L2 norms of producers' rows, as PrimeSVT (arXiv 2606.03428) has them and PSViT (arXiv 2606.03257) is taken to.
Biases and norms are not scored. Left out: scores that look at activations or gradients.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from strop.core.errors import StropError
from strop.core.files import did_you_mean
from strop.core.sampling import keyed_uniform
from strop.prune.units import Axis, Unit

Score = Callable[[nn.Module, Unit], Tensor]
"""From the dense model and a unit to `[width]`, where more is better."""


@torch.no_grad()
def l2(model: nn.Module, unit: Unit) -> Tensor:
    """sqrt of the sum of ||W_p[c, :]||^2 over the unit's producers p, `[width]` float64."""
    squares = torch.zeros(unit.width, dtype=torch.float64)
    for axis in unit.axes:
        if axis.role == "producer":
            squares += _row_squares(model.get_parameter(axis.tensor), axis)
    return squares.sqrt()


def random(seed: int) -> Score:
    """Scores by lot, a pure function of the seed and the unit's name: the control."""
    return lambda model, unit: keyed_uniform(unit.width, seed, "prune", unit.name)


def by_name(name: str, seed: int) -> Score:
    """A score by its name. Raises StropError for an unknown one."""
    known: dict[str, Score] = {"l2": l2, "random": random(seed)}
    if name not in known:
        raise StropError(f"unknown score {name!r}; {did_you_mean(name, list(known))}")
    return known[name]


def kept_count(width: int, rate: float, heads: int = 1, round_to: int = 1) -> int:
    """Channels that stay at a rate: `max(m, m round(n (1 - rate) / m))` of the n in every head, n at most.

    m is `round_to`; a head of fewer than m channels stays whole, and so does all at rate 0.
    """
    each = width // heads
    kept = round_to * round(each * (1 - rate) / round_to)
    return heads * (each if rate == 0 else min(each, max(round_to, kept)))


def keep(scores: Tensor, count: int, heads: int = 1) -> Tensor:
    """Ascending indices `[count]` of the best of `scores` `[width]`, as many in every head; ties by index."""
    by_head = scores.reshape(heads, -1)
    best = by_head.sort(dim=1, descending=True, stable=True).indices[:, : count // heads]
    first = torch.arange(heads, device=best.device)[:, None] * by_head.shape[1]
    return (best + first).flatten().sort().values.cpu()


def _row_squares(weight: Tensor, axis: Axis) -> Tensor:
    """Squared norms of a producer's rows, `[width]`: heads first, then the channels in each."""
    before, behind = weight.shape[: axis.dim], weight.shape[axis.dim + 1 :]
    parts = weight.detach().cpu().double().reshape(math.prod(before), *axis.factors, math.prod(behind))
    own = [1 + factor for factor in axis.own]
    rest = [dim for dim in range(parts.dim()) if dim not in own]
    return parts.square().permute(*own, *rest).flatten(len(own)).sum(-1).flatten()
