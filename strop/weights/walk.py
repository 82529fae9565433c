"""A model's decoder layers one after another: each is loaded, seen, run on calibration text, and released.

One layer is in memory at a time where the model is a skeleton on the meta device and `load` fills it; a model
that is in memory already is walked through in the same way. Left out: matrices outside the decoder layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from strop.core.hooks import decoder_layers
from strop.weights.experts import of_expert
from strop.weights.hessian import Hessians, hessians_of
from strop.weights.linear import matrix

Report = Callable[[str, float], None]
"""Called with what is going on and the share done, 0 to 1."""
AT_ONCE = 8
"""Sequences of calibration text that run together."""


class Matrix(NamedTuple):
    """A matrix to quantize, which can be read when it is needed."""

    name: str
    """That of its linear layer, such as `model.layers.0.mlp.experts.7.gate_proj`."""
    shape: tuple[int, int]
    """`(O, I)`."""
    itemsize: int
    """Bytes of a weight, and so of a scale."""
    read: Callable[[], Tensor]

    @property
    def expert(self) -> bool:
        """Whether it belongs to a routed expert."""
        return of_expert(self.name)


@dataclass
class Unit:
    """A decoder layer with its matrices to quantize, by their names in the model."""

    name: str
    module: nn.Module
    targets: dict[str, nn.Module]


class Resident:
    """A model whose weights are in memory already."""

    def load(self, name: str, module: nn.Module) -> None:
        """Fill a module with its weights."""

    def release(self, module: nn.Module) -> None:
        """Give a module's memory back."""

    def matrix(self, name: str, layer: nn.Module) -> Tensor:
        """The matrix `[O, I]` of a layer."""
        return matrix(layer)


@dataclass
class Walk:
    """The layers of `model` that hold `targets`, and calibration text `[N, T]` that flows through them."""

    model: PreTrainedModel
    targets: dict[str, nn.Module]
    text: Tensor | None = None
    weights: Any = field(default_factory=Resident)

    def matrices(self) -> list[Matrix]:
        """Everything to quantize, in the order of the layers."""
        return [
            Matrix(name, _shape(layer), layer.weight.itemsize, partial(self.weights.matrix, name, layer))
            for name, layer in self.targets.items()
        ]

    def units(self) -> Iterator[Unit]:
        """Every decoder layer, loaded while it is the current one."""
        layers = decoder_layers(self.model)
        prefix = next(name for name, module in self.model.named_modules() if module is layers)
        for index, module in enumerate(layers):
            name = f"{prefix}.{index}"
            mine = {key: layer for key, layer in self.targets.items() if key.startswith(f"{name}.")}
            self.weights.load(name, module)
            yield Unit(name, module, mine)
            self.weights.release(module)

    def flow(self) -> "Flow":
        """The calibration text before the first layer."""
        assert self.text is not None
        return Flow(self.model, self.text)


class Flow:
    """Calibration text on its way through the decoder layers of a model."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, text: Tensor) -> None:
        """`text` is `[N, T]` token ids. The model's embeddings must be in memory; its layers need not."""
        self.hidden: list[Tensor] = []
        self.told: dict[tuple[int, int], tuple[tuple, dict]] = {}
        layers = [*decoder_layers(model)]
        with _passing(layers, self._keep):
            for rows in text.split(AT_ONCE):
                model.base_model(input_ids=rows.to(model.device), use_cache=False)
        self.index = {layer: place for place, layer in enumerate(layers)}

    def _keep(self, place: int, hidden: Tensor, rest: tuple, named: dict) -> None:
        """Each layer is told the same of every batch of a size, but for the hidden states."""
        self.told.setdefault((place, len(hidden)), (rest, named))
        if place == 0:
            self.hidden.append(hidden)

    @torch.no_grad()
    def run(self, layer: nn.Module) -> list[Tensor]:
        """What `layer` makes of the text, `[n, T, H]` a batch; the text stays before the layer."""
        found = []
        for hidden in self.hidden:
            rest, named = self.told[self.index[layer], len(hidden)]
            out = layer(hidden, *rest, **named)
            found.append(out[0] if isinstance(out, tuple) else out)
        return found

    def hessians(self, unit: Unit) -> Hessians:
        """Of the inputs of a layer's matrices; without those that no token reached."""
        with hessians_of(unit.targets) as seen:
            self.run(unit.module)
        return seen

    def advance(self, layer: nn.Module) -> None:
        """Move the text behind `layer`, as it is now."""
        self.hidden = self.run(layer)


@contextmanager
def _passing(layers: list[nn.Module], keep: Callable[..., None]) -> Iterator[None]:
    """While open, layers hand their input on as it is, and `keep` hears what each was told."""

    def stand_in(place: int) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, *rest: Any, **named: Any) -> Tensor:
            keep(place, hidden, rest, named)
            return hidden

        return forward

    for place, layer in enumerate(layers):
        layer.forward = stand_in(place)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _shape(layer: nn.Module) -> tuple[int, int]:
    outputs, inputs = layer.weight.shape
    return (outputs, inputs) if isinstance(layer, nn.Linear) else (inputs, outputs)
