"""PMQ: bits for a layer's experts by how often and how strongly text is routed to them (arXiv 2410.06270).

The calibrated baseline of AlphaQ: importance is frequency^a * routing weight^b * quantization error^c, and
every layer has its own programme. The exponents are inferred. Differs from the paper: errors are those of
rounding to nearest, on some of the tokens that an expert saw.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strop.core.budget import milp
from strop.weights.allocate import Rules, plan_of
from strop.weights.alphaq import Allocated, measure
from strop.weights.base import quiet
from strop.weights.experts import Expert, Experts
from strop.weights.grid import Grid, restored, round_to_nearest
from strop.weights.linear import matrix
from strop.weights.plan import BitPlan
from strop.weights.text import Calibrated
from strop.weights.walk import Matrix, Report, Walk

ROWS = 256
"""Tokens that an expert's error is measured on, at most."""
PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Usage:
    """What one expert was given."""

    tokens: int = 0
    weight: float = 0.0
    """Sum of its routing weights."""
    inputs: list[Tensor] = field(default_factory=list)
    """Some of its tokens, `[n, H]`."""


@dataclass(frozen=True)
class PMQ(Calibrated, Allocated):
    """Bits by routing on calibration text; an expert's three matrices share a width."""

    granularity: str = "expert"
    a: float = 1.0
    """Exponent of the frequency."""
    b: float = 1.0
    """Exponent of the mean routing weight."""
    c: float = 2.0
    """Exponent of the error of the expert's outputs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity != "expert":
            raise ValueError(f"granularity must be expert, got {self.granularity!r}")

    def allocate(
        self, walk: Walk, experts: Sequence[Matrix], rules: Rules, report: Report = quiet
    ) -> BitPlan:
        """One pass of the text through the layers as they are, and one programme a layer."""
        flow, widths, objective = walk.flow(), list(rules.grids), 0.0
        chosen: dict[str, int] = {}
        done, layers = 0, {matrix.name.partition(".experts.")[0] for matrix in experts}
        for unit in walk.units():
            for name, module in unit.module.named_modules(prefix=unit.name):
                if isinstance(module, Experts):
                    with usage_of(module) as usage:
                        flow.run(unit.module)
                    cost = self._cost(module, usage, rules.grids)
                    size = np.tile(np.array(widths, dtype=float), (len(module), 1))
                    columns = milp(cost, size, self.bits * len(module), self._least(widths, len(module)))
                    chosen |= {f"{name}.{index}": column for index, column in enumerate(columns)}
                    objective += float(cost[np.arange(len(module)), columns].sum())
                    done += 1
                    report("watching the routers", done / len(layers))
            flow.advance(unit.module)
        stats = [measure(matrix, rules.grids, None) for matrix in experts]
        picked = np.array([chosen[matrix.name.rpartition(".")[0]] for matrix in experts])
        said = "widths by routing on calibration text, one programme a layer"
        return plan_of(stats, rules, picked, np.ones(len(stats)), said=said, objective=objective)

    def _cost(self, module: Experts, usage: list[Usage], grids: dict[int, Grid]) -> np.ndarray:
        """frequency^a * weight^b * error^c `[E, B]`; nothing for an expert that no token reached."""
        total = max(sum(seen.tokens for seen in usage), 1)
        rows = []
        for expert, seen in zip(module, usage, strict=True):
            importance = (seen.tokens / total) ** self.a * (seen.weight / max(seen.tokens, 1)) ** self.b
            errors = [
                output_error(expert, seen, grid) ** self.c if seen.tokens else 0.0 for grid in grids.values()
            ]
            rows.append([importance * error for error in errors])
        return np.array(rows)

    def _least(self, widths: list[int], count: int) -> list[int]:
        """At least one expert at 3 bits and one at 2, where both are candidates and the budget has room."""
        room = {2, 3} <= set(widths) and count > 1 and self.bits * count >= widths[0] * (count - 2) + 5
        return [int(room and width in (2, 3)) for width in widths]


@contextmanager
def usage_of(module: Experts) -> Iterator[list[Usage]]:
    """While open, the list tells what each expert is given."""
    usage = [Usage() for _ in module]

    def hear(_: nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, chosen, weights = given
        for index in chosen.unique().tolist():
            token, place = torch.where(chosen == index)
            seen = usage[index]
            room = max(ROWS - sum(map(len, seen.inputs)), 0)
            seen.tokens += len(token)
            seen.weight += float(weights[token, place].sum())
            seen.inputs.append(hidden[token[:room]].detach().clone())

    handle = module.register_forward_pre_hook(hear)
    try:
        yield usage
    finally:
        handle.remove()


@torch.no_grad()
def output_error(expert: Expert, seen: Usage, grid: Grid) -> float:
    """Frobenius norm of what rounding an expert to `grid` changes of its outputs for all its tokens."""
    x = torch.cat(seen.inputs).float()
    exact = {part: matrix(getattr(expert, part)).float() for part in PARTS}
    rounded = {
        part: restored(round_to_nearest(matrix(getattr(expert, part)), grid), grid).float() for part in PARTS
    }
    change = _outputs(expert, x, rounded) - _outputs(expert, x, exact)
    return float(change.square().sum(1).mean() * seen.tokens) ** 0.5


def _outputs(expert: Expert, x: Tensor, weights: dict[str, Tensor]) -> Any:
    gated = expert.act_fn(F.linear(x, weights["gate_proj"])) * F.linear(x, weights["up_proj"])
    return F.linear(gated, weights["down_proj"])
