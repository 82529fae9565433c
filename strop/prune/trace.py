"""Find the units of a model by watching one small forward pass, and try each of them.

Every operation joins the axes that hold the same channels (`rules`); what is then left free and has a
producer is a candidate. Each is cut by half and compared with its mask, so that code with sizes of its own,
as a view by head_dim, shows: where the width inside heads cannot go, whole heads are tried.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from strop.core.errors import StropError
from strop.prune.axes import Atom, Dim, freeze, fresh, size
from strop.prune.calls import Call, Kind, Value, frozen
from strop.prune.cut import difference, outputs, tensors
from strop.prune.grouping import Groups, named
from strop.prune.rules import PRODUCTS, RULES, pointwise
from strop.prune.shapes import created
from strop.prune.units import Example, Unit, Units, example_of

SHARE = 0.25
"""How much of a model's tensors are tried at once."""


@torch.no_grad()
def trace(model: nn.Module, example: Example | None = None) -> Units:
    """The units of `model`, found by a forward pass on keyword inputs `example` in evaluation mode.

    A model of 16-bit numbers is traced in a copy in float32, since rounding would hide what a wrong cut
    changes. Raises StropError as `example_of` does, and where the model does not run on the example.
    """
    example = example_of(model) if example is None else example
    if any(_short(parameter) for parameter in model.parameters()):
        model = copy.deepcopy(model).float()
        example = tree_map(lambda leaf: leaf.float() if _short(leaf) else leaf, dict(example))
    watch = Watch(model, example)
    with sdpa_kernel(SDPBackend.MATH), watch:
        given = outputs(model, example)
    for value in given:
        for dim in watch.seen(value).dims:
            freeze(dim, "it is the model's output")
    return _tried(model, example, Groups(model, watch.axes, watch.roles), _peak(given))


class Watch(TorchDispatchMode):
    """While open, follows every operation: which atoms the dimensions of each tensor are made of."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.roles: dict[tuple[str, int], str] = {}
        """Of the axes of parameters, in the order of their use."""
        self.axes: dict[tuple[str, int], Dim] = {}
        """All axes of parameters and buffers that are longer than 1."""
        self._values = WeakIdKeyDictionary()
        for name, tensor in tensors(model).items():
            dims = tuple((Atom(n, (name, i)),) if n != 1 else () for i, n in enumerate(tensor.shape))
            self._values[tensor] = Value(dims, Kind.WEIGHT)
            self.axes.update({(name, i): dim for i, dim in enumerate(dims) if dim})
        for tensor in tree_leaves(dict(example)):
            if isinstance(tensor, Tensor):
                self._values[tensor] = Value(_fixed(tensor, "it is the model's input"), Kind.INPUT)

    def seen(self, tensor: Tensor) -> Value:
        """What a tensor is made of; one that came from elsewhere is a constant."""
        if tensor not in self._values:
            self._values[tensor] = Value(tuple(fresh(n) for n in tensor.shape), Kind.CONSTANT)
        return self._values[tensor]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        if made:
            known = func._schema.arguments
            arguments = {a.name: a.default_value for a in known if a.has_default_value()}
            arguments |= dict(zip((a.name for a in known), args, strict=False)) | (kwargs or {})
            self._follow(func, tree_map(self._seen, arguments), made)
        return given

    def _seen(self, leaf: Any) -> Any:
        return self.seen(leaf) if isinstance(leaf, Tensor) else leaf

    def _follow(self, func: Any, arguments: dict[str, Any], made: list[Tensor]) -> None:
        name = func._schema.name.rpartition("::")[2].rstrip("_")
        call = Call(name, arguments, tuple(made[0].shape), self.roles)
        values = call.values()
        rule = RULES.get(name) or (pointwise if torch.Tag.pointwise in func.tags else frozen)
        dims = (rule if values and made[0].numel() else created)(call)
        kinds = {value.kind for value in values} or {Kind.CONSTANT}
        meets = name in PRODUCTS and Kind.WEIGHT in kinds and len(kinds) > 1
        for tensor in made:
            fits = tuple(size(dim) for dim in dims) == tensor.shape
            held = dims if fits else _fixed(tensor, call.reason)
            self._values[tensor] = Value(held, Kind.ACTIVE if meets else max(kinds))


def _short(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.itemsize < 4


def _fixed(tensor: Tensor, reason: str) -> tuple[Dim, ...]:
    dims = tuple(fresh(length) for length in tensor.shape)
    for dim in dims:
        freeze(dim, reason)
    return dims


def _peak(values: Sequence[Tensor]) -> float:
    return max((float(value.abs().max()) for value in values if value.numel()), default=0.0)


def _tried(model: nn.Module, example: Example, groups: Groups, peak: float) -> Units:
    """Keep the candidates of which a cut equals a mask; whole heads only where no width in them can go."""
    accepted: list[Unit] = []
    failed: list[tuple[Unit, str]] = []
    waiting = [groups.options(atom) for atom in groups.free()]
    sizes = {name: tensor.nbytes for name, tensor in tensors(model).items()}
    while waiting:
        cut = {place for unit in accepted for place in unit.places()}
        batch, waiting = _batch([o for o in waiting if cut.isdisjoint(o[0].places())], sizes)
        good, bad = _sift(model, batch, example, peak)
        accepted += good
        failed += bad
    accepted.sort(key=lambda unit: groups.use(unit.places()))
    units, losers = named(accepted), named([unit for unit, _ in failed], short=False)
    reasons = [(unit.name, problem) for unit, (_, problem) in zip(losers, failed, strict=True)]
    return Units(tuple(units), (*reasons, *groups.unused(units, losers)))


def _batch(waiting: list[list[Unit]], sizes: dict[str, int]) -> tuple[list[list[Unit]], list[list[Unit]]]:
    """Candidates to try together, on axes of their own and a share of the model, and those that wait."""
    batch, later, room = [], [], SHARE * sum(sizes.values())
    spoken: set[tuple[str, int]] = set()
    for options in waiting:
        places = options[0].places()
        room -= (held := sum(sizes[tensor] for tensor, _ in places))
        if batch and (room < 0 or not spoken.isdisjoint(places)):
            room += held
            later.append(options)
        else:
            batch.append(options)
        spoken.update(places)
    return batch, later


def _sift(
    model: nn.Module, batch: list[list[Unit]], example: Example, peak: float
) -> tuple[list[Unit], list[tuple[Unit, str]]]:
    """Units of a batch that can be cut, and those that cannot, with why: one by one where not all can.

    What cannot be cut in one layer is not tried in others of the same names.
    """
    firsts = [options[0] for options in batch]
    if len(batch) > 1 and _problem(model, firsts, example, peak) is None:
        return firsts, []
    good: list[Unit] = []
    bad: list[tuple[Unit, str]] = []
    problems: dict[object, str] = {}
    for options in batch:
        alike = tuple((re.sub(r"\d+", "#", axis.tensor), axis.dim, axis.own) for axis in options[0].axes)
        if alike not in problems:
            found = [_problem(model, [unit], example, peak) for unit in options]
            if None in found:
                good.append(options[found.index(None)])
                continue
            problems[alike] = str(found[0])
        bad.append((options[0], problems[alike]))
    return good, bad


def _problem(model: nn.Module, units: list[Unit], example: Example, peak: float) -> str | None:
    """Why half of each of these units cannot be cut, if so; each head keeps other channels, drawn by lot."""
    numbered = tuple(replace(unit, name=str(index)) for index, unit in enumerate(units))
    drawn = torch.Generator().manual_seed(0)
    kept = {}
    for unit in numbered:
        each = unit.width // unit.heads
        lots = torch.rand(unit.heads, each, generator=drawn).argsort(1)
        stays = lots[:, : max(1, each // 2)].sort(1).values
        kept[unit.name] = (stays + each * torch.arange(unit.heads)[:, None]).flatten()
    try:
        off = difference(model, Units(numbered, ()), kept, example)
    except StropError as error:
        return str(error)
    rounding = torch.finfo(next(model.parameters()).dtype).eps ** 0.7  # 1e-5 in float32
    return None if off <= rounding * peak else f"the cut changes outputs by {off:.2g} over zeroing"
