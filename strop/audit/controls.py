"""What survival is compared with: other changes of the same size or cost, other pairings, other dictionaries.

Changes of weights are made on copies that share all other tensors, and concern the linear layers that the
caller names. Left out: structured pruning, noise that knows the activations.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from strop.audit.sae import SAE
from strop.audit.survival import DAMAGED, SURVIVED
from strop.core.hooks import shared
from strop.core.sampling import keyed_generator, keyed_normal

Layers = Callable[[PreTrainedModel], Mapping[str, nn.Module]]
"""The linear layers of a model that may change, by name; may split fused experts in place."""
STEPS = 14
"""Bisections of a share of weights."""
ROUNDS = 3
"""Most readings of all text while a share is sought on a part of it."""
MOST = 0.95
"""Largest share of weights that is pruned."""
TOLERANCE = 0.01
"""Relative difference of perplexity up to which two changes cost the same."""


def matrices(model: PreTrainedModel, layers: Layers) -> dict[str, Tensor]:
    """The matrices `[O, I]` of a model's linear layers; the model stays as it is."""
    return {name: _matrix(layer) for name, layer in layers(shared(model)).items()}


def with_matrices(model: PreTrainedModel, layers: Layers, new: Mapping[str, Tensor]) -> PreTrainedModel:
    """A copy of the model with some of its matrices `[O, I]` replaced, in the dtype that they had."""
    copied = shared(model)
    held = layers(copied)
    for name, matrix in new.items():
        layer = held[name]
        kept = matrix.to(_matrix(layer).dtype)
        kept = kept.T.contiguous() if isinstance(layer, Conv1D) else kept
        layer.weight = nn.Parameter(kept, requires_grad=False)
    return copied


def noisy(before: PreTrainedModel, after: PreTrainedModel, layers: Layers, seed: int) -> PreTrainedModel:
    """`before` with Gaussian noise on each matrix, of the Frobenius norm of its change to `after`."""
    old, new = matrices(before, layers), matrices(after, layers)
    changed = {}
    for name, matrix in old.items():
        matrix = matrix.float()
        size = (new[name].float() - matrix).norm()
        noise = keyed_normal(matrix.shape, seed, "noise", name).to(matrix.device)
        changed[name] = matrix + noise * (size / noise.norm())
    return with_matrices(before, layers, changed)


class Pruning:
    """A model without the smallest weights of each matrix."""

    def __init__(self, model: PreTrainedModel, layers: Layers) -> None:
        self.model, self.layers = model, layers
        self.matrices = matrices(model, layers)
        self.orders = {
            name: matrix.flatten().abs().argsort(stable=True) for name, matrix in self.matrices.items()
        }

    def at(self, share: float) -> PreTrainedModel:
        """A copy of the model with this share of each matrix at 0."""
        thin = {}
        for name, matrix in self.matrices.items():
            flat = matrix.flatten().clone()
            flat[self.orders[name][: round(share * flat.numel())]] = 0
            thin[name] = flat.view_as(matrix)
        return with_matrices(self.model, self.layers, thin)


class Match(NamedTuple):
    """A share of pruned weights that costs what another change does."""

    share: float
    loss: float
    off: float
    """Its perplexity over the one asked for, less 1."""

    @property
    def near(self) -> bool:
        """Whether it lies within `TOLERANCE`."""
        return abs(self.off) <= TOLERANCE


def match(loss: Callable[[float], float], target: float, steps: int = STEPS) -> Match:
    """The share whose loss, nats a token, is nearest to `target`, of those that a bisection tries.

    `loss` gives that of a share.
    """
    low, high = 0.0, MOST
    tried = []
    for _ in range(steps):
        share = (low + high) / 2
        found = loss(share)
        tried.append(matched(share, found, target))
        low, high = (share, high) if found < target else (low, share)
    return min(tried, key=lambda one: abs(one.off))


def match_by_part(
    part: Callable[[float], float],
    whole: Callable[[float], float],
    target: float,
    apart: float,
    steps: int = STEPS,
) -> Match:
    """`match` of the loss on all text, which is read a few times: bisections read a part of it.

    `apart` is by how much the part's loss lies above that of the whole before pruning; it is measured again
    at each share that is found.
    """
    tried = []
    for _ in range(ROUNDS):
        found = match(part, target + apart, steps)
        tried.append(matched(found.share, whole(found.share), target))
        if abs(tried[-1].off) <= TOLERANCE / 2:
            break
        apart = found.loss - tried[-1].loss
    return min(tried, key=lambda one: abs(one.off))


def matched(share: float, loss: float, target: float) -> Match:
    """How near a share's loss is to the one asked for."""
    return Match(share, loss, math.expm1(loss - target))


def mispaired(features: Tensor, seed: int = 0) -> Tensor:
    """Features `[..., m]`, each in the place of another: one cycle through all, keyed by seed."""
    order = torch.randperm(features.shape[-1], generator=keyed_generator(seed, "pairing"))
    places = torch.empty_like(order)
    places[order] = order.roll(1)
    return features[..., places.to(features.device)]


def untrained(sae: SAE, seed: int = 0) -> SAE:
    """An autoencoder of the same form that learned nothing: directions drawn by seed, biases as they are.

    Encoder and decoder share each direction, at the lengths that theirs had.
    """
    drawn = keyed_normal((sae.m, sae.d), seed, "untrained").to(sae.w_enc.device)
    drawn /= drawn.norm(dim=1, keepdim=True)
    return dataclasses.replace(
        sae,
        w_enc=(drawn * sae.w_enc.norm(dim=0)[:, None]).T.contiguous(),
        w_dec=drawn * sae.w_dec.norm(dim=1, keepdim=True),
    )


def neurons(states: Tensor) -> Tensor:
    """The states `[..., d]` themselves as features `[..., 2 d]`: what is above 0, and what is below."""
    return torch.cat([states.relu(), (-states).relu()], dim=-1)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Shared members over all members of two sets, as masks; 0 where both are empty."""
    return float((one & other).sum() / max((one | other).sum(), 1))


def chance_jaccard(n: int, one: int, other: int) -> float:
    """The exact expectation of `jaccard` for independent uniform sets of these sizes among n."""
    from scipy.stats import hypergeom

    if not one + other:
        return 0.0
    common = np.arange(max(0, one + other - n), min(one, other) + 1)
    return float((hypergeom.pmf(common, n, one, other) * common / (one + other - common)).sum())


def overlap(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How alike two changes hurt features, from the correlations `[m]` that they left."""
    from scipy.stats import spearmanr

    found = {
        "spearman": float(spearmanr(1 - one, 1 - other).statistic),
        "pearson": float(np.corrcoef(one, other)[0, 1]),
    }
    for name, (a, b) in {
        "lost": (one <= SURVIVED, other <= SURVIVED),
        "damaged": (one < DAMAGED, other < DAMAGED),
    }.items():
        found[f"jaccard_{name}"] = jaccard(a, b)
        found[f"chance_{name}"] = chance_jaccard(len(a), int(a.sum()), int(b.sum()))
    return found


def _matrix(layer: nn.Module) -> Tensor:
    """`[O, I]`, whatever the layer keeps."""
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight
