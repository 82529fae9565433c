"""What can be cut: groups of parameter axes that hold the same channels, and must be cut together."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch
from torch import nn

from strop.core.errors import StropError
from strop.core.files import did_you_mean

TOKENS = 4
"""Tokens of the example that a language model is traced on."""


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter or buffer that holds the channels of a unit."""

    tensor: str
    """Dotted name."""
    dim: int
    """Which dimension."""
    factors: tuple[int, ...]
    """Sizes that the axis is made of, row-major: a matrix of 4 heads of 16 has (4, 16)."""
    own: tuple[int, ...]
    """Which of the factors are the unit's: its width, or its heads and the width in each."""
    role: str
    """`producer` (an output axis), `consumer` (an input axis) or `tied` (norms, biases, depthwise)."""

    @property
    def size(self) -> int:
        """Length of the axis."""
        return prod(self.factors)

    def __str__(self) -> str:
        sizes = (f"[{n}]" if index in self.own else f"{n}" for index, n in enumerate(self.factors))
        return f"{self.role:8}  {self.tensor}  dim {self.dim} = {' x '.join(sizes)}"


@dataclass(frozen=True)
class Unit:
    """Channels that leave together, wherever they are held."""

    name: str
    """The module that holds them, and what tells the unit apart there."""
    width: int
    """Channels in all, those of every head."""
    heads: int
    """Parts that keep equal counts, each its own channels; 1 where there are none."""
    kind: str
    """`inner`, or `stream`: a residual stream, where an addition joins several producers."""
    where: str
    """`block` if it lies within one element of an nn.ModuleList, else `stem`."""
    first: bool
    """Whether its producer reads the model's input."""
    axes: tuple[Axis, ...]
    """All that is cut."""

    def places(self) -> list[tuple[str, int]]:
        """The tensors and dimensions that hold it."""
        return [(axis.tensor, axis.dim) for axis in self.axes]

    def step(self, round_to: int) -> int:
        """Channels that go at once where every axis is to stay a multiple of `round_to`.

        A channel that is a whole head takes its width out of an axis, so that fewer of them make a multiple.
        """
        entries = (prod(axis.factors[axis.own[-1] + 1 :]) for axis in self.axes)
        return round_to // gcd(round_to, *entries)

    def describe(self) -> str:
        """The group in full: a line of its own, then one for every axis, the unit's factors in brackets."""
        heads = f" in {self.heads} heads" if self.heads > 1 else ""
        first = ", first" if self.first else ""
        lines = [f"{self.name}: {self.width} channels{heads} ({self.kind}, {self.where}{first})"]
        return "\n".join(lines + [f"  {axis}" for axis in self.axes])


@dataclass(frozen=True)
class Units:
    """What of a model can be cut, and why the rest cannot."""

    units: tuple[Unit, ...]
    """In the order of the network."""
    frozen: tuple[tuple[str, str], ...]
    """An axis (`name[dim]`) or a unit that cannot be cut, and the reason."""

    def __getitem__(self, name: str) -> Unit:
        """The unit of that name. Raises StropError if there is none."""
        for unit in self.units:
            if unit.name == name:
                return unit
        raise StropError(f"there is no unit {name!r}: {did_you_mean(name, [u.name for u in self.units])}")

    def free(self) -> tuple[Unit, ...]:
        """Units that prune by default: inside branches, and not what reads the input."""
        return tuple(unit for unit in self.units if unit.kind == "inner" and not unit.first)

    def blocks(self) -> tuple[Unit, ...]:
        """Units inside the blocks of a transformer."""
        return tuple(unit for unit in self.units if unit.kind == "inner" and unit.where == "block")

    def streams(self) -> tuple[Unit, ...]:
        """Residual streams."""
        return tuple(unit for unit in self.units if unit.kind == "stream")

    def describe(self) -> str:
        """Every unit in full, then what is frozen."""
        groups = [unit.describe() for unit in self.units]
        return "\n".join(groups + [f"frozen: {name}: {reason}" for name, reason in self.frozen])


def example_of(model: nn.Module) -> dict[str, Any]:
    """Keyword inputs of a tiny forward pass: of `model.example()` where it has one, else by transformers'
    `main_input_name`.

    Raises StropError where neither tells.
    """
    if hasattr(model, "example"):
        return model.example()
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if name == "input_ids":
        text = config.get_text_config()
        ids = torch.arange(1, TOKENS + 1, device=next(model.parameters()).device) * 7 % text.vocab_size
        return {"input_ids": ids[None], **({"use_cache": False} if hasattr(text, "use_cache") else {})}
    if name == "pixel_values":
        side = config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        noise = torch.randn(1, config.num_channels, height, width, generator=torch.Generator().manual_seed(0))
        weight = next(model.parameters())
        return {"pixel_values": noise.to(weight.device, weight.dtype)}
    raise StropError(
        f"nothing tells what {type(model).__name__} reads: pass example={{'name of the input': tensor}}, or "
        "give the model a method example() that returns it"
    )


Example = Mapping[str, Any]
"""Keyword inputs of a forward pass."""
