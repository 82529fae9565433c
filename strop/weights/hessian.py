"""Hessians of layers: how the inputs of a linear layer correlate, which decides what errors of weights cost.

On inputs x, weights that are off by E give a mean squared error of tr(E H E^T) / 2, where H = 2/n sum x x^T
(GPTQ, arXiv 2210.17323, section 3.1). Left out: convolutions, and H kept on another device than the inputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from strop.core.errors import StropError


@dataclass
class Hessians:
    """What layers were fed, by their names. A layer that never ran has no entry."""

    matrices: dict[str, Tensor] = field(default_factory=dict)
    """H `[I, I]` float32. Layers that were fed the same tensors hold one, which must not be written to."""
    tokens: dict[str, int] = field(default_factory=dict)
    """n, the number of inputs."""


@contextmanager
def hessians_of(layers: Mapping[str, nn.Module]) -> Iterator[Hessians]:
    """While open, watch what linear `layers` (`nn.Linear` or `Conv1D`) are fed; filled when it closes.

    Raises StropError then, if a layer reads NaN or infinity.
    """
    found, watch = Hessians(), _Watch()
    handles = [layer.register_forward_pre_hook(partial(watch.see, name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name, mean in watch.means.items():
        if not torch.isfinite(mean.hessian.diagonal()).all():
            raise StropError(
                f"{name} reads NaN or infinity on the calibration text: load the model in bfloat16 or float32"
            )
        found.matrices[name], found.tokens[name] = mean.hessian, mean.tokens


@dataclass(frozen=True, eq=False)
class _Mean:
    """2 x x^T, averaged over some inputs."""

    hessian: Tensor
    tokens: int

    def joined(self, other: "_Mean") -> "_Mean":
        """The mean over the inputs of both."""
        tokens = self.tokens + other.tokens
        return _Mean(self.hessian.lerp(other.hessian, other.tokens / tokens), tokens)


class _Watch:
    """A mean for each layer. Layers whose inputs were the same tensors so far hold the same mean."""

    def __init__(self) -> None:
        self.means: dict[str, _Mean] = {}
        self.latest: tuple[Tensor, int | None] | None = None  # holds the tensor, so that `is` can be trusted
        self.mean: _Mean
        self.grown: dict[_Mean | None, _Mean] = {}
        """What each mean became when the latest tensor joined it."""

    @torch.no_grad()
    def see(self, name: str, _layer: nn.Module, given: tuple[Tensor]) -> None:
        """Layer `name` is fed `given[0]`, `[..., I]`."""
        fed = given[0]
        if not fed.numel():
            return
        version = None if fed.is_inference() else fed._version
        if self.latest is None or self.latest[0] is not fed or self.latest[1] != version:
            inputs = fed.detach().flatten(0, -2).float()
            self.latest, self.grown = (fed, version), {}
            self.mean = _Mean((inputs.T @ inputs).mul_(2 / len(inputs)), len(inputs))
        before = self.means.get(name)
        if before not in self.grown:
            self.grown[before] = before.joined(self.mean) if before else self.mean
        self.means[name] = self.grown[before]
