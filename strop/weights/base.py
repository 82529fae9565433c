"""The contract of the `weights` slot: a method says which grid each matrix gets, and how it becomes codes.

The base finds the matrices, refuses what cannot be quantized before it touches anything, walks through the
decoder layers and swaps each matrix for its packed form. Left out: embeddings, output heads, routers.
"""

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from strop.core.errors import StropError
from strop.core.heap import EVERY, trim
from strop.core.hooks import decoder_layers
from strop.core.method import Method
from strop.weights.experts import split_experts
from strop.weights.grid import Codes, Grid, restored
from strop.weights.linear import PackedConv1D, PackedLinear
from strop.weights.plan import BitPlan, Row
from strop.weights.text import Calibrated, Text
from strop.weights.walk import Matrix, Report, Unit, Walk

IGNORED = frozenset({"lm_head", "router", "gate", "shared_expert_gate"})


Found = dict[str, dict[str, float]]
"""What was found of matrices, by name, as columns of a plan."""


def quiet(what: str, share: float) -> None:
    """A report that nobody reads."""


class WeightMethod(Method, abc.ABC):
    """Quantizes the weights of a causal language model; members are frozen dataclasses."""

    @property
    def hessians(self) -> bool:
        """Whether `quantize` wants to know what each layer reads."""
        return isinstance(self, Calibrated)

    @property
    def whole_zeros(self) -> bool:
        """Whether zero is always a whole code."""
        return True

    @property
    def asked(self) -> Calibrated | None:
        """The calibration text that it wants to see, or None."""
        return self if isinstance(self, Calibrated) else None

    @abc.abstractmethod
    def plan(self, walk: Walk, report: Report = quiet) -> BitPlan:
        """The grid of every matrix. Raises StropError where the model or the budget does not suit."""

    @abc.abstractmethod
    def quantize(self, weight: Tensor, grid: Grid, hessian: Tensor | None = None) -> Codes:
        """Quantize one finite matrix `[O, I]` whose inputs have a known `hessian` `[I, I]`, or None."""

    def apply(
        self, model: PreTrainedModel, text: Text | None = None, report: Report = quiet
    ) -> PreTrainedModel:
        """Swap every target of `model` for its packed form, in place, and return `model`.

        Raises StropError as `targets` and `plan` do, before anything is quantized.
        """
        walk = self.walk(model, text)
        for matrix in walk.matrices():
            require_finite(matrix.name, matrix.read())
        plan = self.plan(walk, report)
        for _ in self.pack(walk, plan, report):
            pass
        return model

    def walk(self, model: PreTrainedModel, text: Text | None, **weights: Any) -> Walk:
        """The way through `model`, whose fused experts are split in place."""
        refuse_quantized(model)
        split_experts(model)
        if self.asked and text is None:
            raise ValueError(f"{type(self).__name__} needs calibration text")
        return Walk(model, targets(model), text(self.asked) if self.asked and text else None, **weights)

    @torch.no_grad()
    def pack(
        self,
        walk: Walk,
        plan: BitPlan,
        report: Report = quiet,
        kept: Callable[[Unit], dict[str, PackedLinear] | None] = lambda unit: None,
    ) -> Iterator[tuple[Unit, Found]]:
        """Quantize layer by layer; yields each layer packed, with what was found of each matrix.

        `measured` is the relative squared error, `tokens` what the layer was fed, where that was watched.
        A layer of which `kept` has the packed form is not quantized again, nor yielded.
        """
        grids = {row.name: row.grid for row in plan.rows}
        flow = walk.flow() if self.hessians else None
        done = 0
        for unit in walk.units():
            stored, found = kept(unit), Found()
            if stored is not None:
                for name, packed in stored.items():
                    walk.model.set_submodule(name, packed)
            else:
                seen = flow.hessians(unit) if flow else None
                for name in [*unit.targets]:
                    hessian = seen.matrices.pop(name, None) if seen else None
                    packed, error = self._packed(name, unit.targets.pop(name), walk, grids[name], hessian)
                    found[name] = {"measured": error} | ({"tokens": seen.tokens.get(name, 0)} if seen else {})
                    walk.model.set_submodule(name, packed)
                    report("quantizing", (done + len(found)) / len(grids))
                    if len(found) % EVERY == 0:
                        trim()
            done += len(stored or found)
            if flow is not None:
                flow.advance(unit.module)
            if stored is None:
                yield unit, found

    def _packed(
        self, name: str, layer: nn.Module, walk: Walk, grid: Grid, hessian: Tensor | None
    ) -> tuple[PackedLinear, float]:
        walk.targets.pop(name)
        weight = walk.weights.matrix(name, layer)
        require_finite(name, weight)
        quantized = self.quantize(weight, grid, hessian)
        back = restored(quantized, grid)
        if not torch.isfinite(back).all():
            raise StropError(
                f"{name}.weight is too large for {str(weight.dtype).removeprefix('torch.')} once rounded to "
                f"{grid}: use more bits, or a bfloat16 checkpoint"
            )
        kind = PackedConv1D if isinstance(layer, Conv1D) else PackedLinear
        return kind(quantized, grid, layer.bias), relative_error(weight, back)


def relative_error(weight: Tensor, other: Tensor) -> float:
    """||W - W'||^2 / ||W||^2; 0 for a matrix of zeros."""
    peak = weight.abs().max().float()
    if not peak:
        return 0.0
    weight = weight.float() / peak
    return float((other.float() / peak - weight).square().sum() / weight.square().sum())


@dataclass(frozen=True)
class Uniform(WeightMethod, abc.ABC):
    """One grid for every matrix."""

    bits: int = 8
    """Width of a code, 1 to 8."""
    group: int | None = None
    """Input channels that share one scale; None gives one scale per output channel."""
    symmetric: bool = True
    """Whether zero sits in the middle of the codes; otherwise each group stores where it is."""

    def __post_init__(self) -> None:
        Grid(self.bits, self.group, self.symmetric)

    @property
    def grid(self) -> Grid:
        """Which numbers a group of weights may take."""
        return Grid(self.bits, self.group, self.symmetric)

    def settings(self) -> str:
        return self.spell(str(self.grid), "bits", "group", "symmetric")

    def plan(self, walk: Walk, report: Report = quiet) -> BitPlan:
        """The same grid for all."""
        require_fit(walk.matrices(), [self.grid])
        rows = tuple(row(matrix, self.grid) for matrix in walk.matrices())
        return BitPlan(rows=rows, method=type(self).__name__.lower(), said=f"every matrix {self.grid}")


def row(matrix: Matrix, grid: Grid, **found: Any) -> Row:
    """A matrix's line of a plan."""
    bits = grid.effective_bits(matrix.shape[1], matrix.itemsize)
    return Row(
        name=matrix.name, shape=matrix.shape, expert=matrix.expert, grid=grid, effective_bits=bits, **found
    )


def targets(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers that are quantized, by name: those of the decoder layers, without routers.

    Raises StropError if there is none, or if two of them share one matrix.
    """
    inside = {id(module) for module in decoder_layers(model).modules()}
    found = {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) in (nn.Linear, Conv1D)
        and id(layer) in inside
        and name.rpartition(".")[2] not in IGNORED
    }
    if not found:
        raise StropError(
            f"there is no nn.Linear or Conv1D to quantize in the layers of {type(model).__name__}: pass a "
            "transformers causal language model that is not packed yet"
        )
    owners: dict[int, str] = {}
    for name, layer in found.items():
        other = owners.setdefault(_place(layer.weight), name)
        if other != name:
            raise StropError(
                f"{name} and {other} share one matrix, which would be stored twice: leave the weights of a "
                f"{type(model).__name__} as they are"
            )
    return found


def refuse_quantized(model: PreTrainedModel) -> None:
    """Raise StropError if the checkpoint is quantized already."""
    if getattr(model.config, "quantization_config", None) is not None or any(
        isinstance(module, PackedLinear) for module in model.modules()
    ):
        raise StropError(
            "this checkpoint is already quantized, and quantizing it again would add errors: load the 16-bit "
            "checkpoint that it was made from"
        )


def require_finite(name: str, weight: Tensor) -> None:
    """Raise StropError if a matrix holds numbers that are none."""
    if not torch.isfinite(weight).all():
        raise StropError(f"{name}.weight holds NaN or infinity: repair the checkpoint before quantizing it")


def require_fit(matrices: Sequence[Matrix], grids: Sequence[Grid]) -> None:
    """Raise StropError unless the rows of every matrix divide into groups and bytes of all of `grids`."""
    for matrix in matrices:
        for grid in grids:
            _refuse_width(matrix, grid)


def _refuse_width(matrix: Matrix, grid: Grid) -> None:
    width = matrix.shape[1]
    if width % grid.width(width):
        raise StropError(
            f"{matrix.name} has {width} input channels, not a multiple of group={grid.group}: choose a "
            "group that divides them, or group=None (--group 0)"
        )
    if grid.bits != 8 and width % 8:
        raise StropError(
            f"{matrix.name} has {width} input channels, whose {grid.bits}-bit codes do not fill whole "
            "bytes: use bits=8"
        )


def _place(weight: Tensor) -> int:
    """Where a matrix lies; on the meta device, which tensor it is."""
    return id(weight) if weight.is_meta else weight.data_ptr()
