"""Cut channels out of a model, physically, and check that this equals zeroing them.

Every axis of a unit is indexed, so all of its tensors shrink; what is not cut is shared with the model that
came in, which stays as it was. `difference` holds the result against the dense model with the same channels
zeroed where they are read.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from strop.core.errors import StropError, reason
from strop.core.narrow import resize
from strop.prune.units import Axis, Example, Unit, Units

Kept = Mapping[str, Tensor]
"""By name of a unit, the channels that stay: whole numbers of 0 to its width less one, ascending."""


def cut(model: nn.Module, units: Units, kept: Kept) -> nn.Module:
    """A model without the channels of `units` that are not `kept`; units not named stay whole.

    It shares every tensor that is not cut with `model`, so train a deep copy of it.
    Raises StropError as `channels` does.
    """
    whole = tensors(model)
    small: dict[str, Tensor] = {}
    stay: dict[int, Tensor] = {}
    for name, indices in kept.items():
        unit = units[name]
        stays = channels(unit, indices)
        for axis in unit.axes:
            value = small.get(axis.tensor, whole[axis.tensor].detach())
            index = _index(axis, stays).to(value.device)
            small[axis.tensor] = value.index_select(axis.dim, index)
            if axis.dim == 0:
                stay[id(whole[axis.tensor])] = index
    thin = _around(model, {id(whole[name]): _like(whole[name], value) for name, value in small.items()})
    touched = {id(whole[name]) for name in small}
    for before, after in zip(model.modules(), thin.modules(), strict=True):
        if any(id(tensor) in touched for tensor in _held(before)):
            _resize(before, after, stay)
    return thin


def masked(model: nn.Module, units: Units, kept: Kept) -> nn.Module:
    """The dense model with the channels that are not `kept` zeroed at the input columns of their consumers.

    Where a unit has no consumer, as queries and keys that meet each other, its producers are zeroed.
    Raises StropError as `channels` does.
    """
    whole = tensors(model)
    zeroed: dict[str, Tensor] = {}
    for name, indices in kept.items():
        unit = units[name]
        stays = channels(unit, indices)
        readers = [axis for axis in unit.axes if axis.role == "consumer"]
        for axis in readers or unit.axes:
            value = zeroed.get(axis.tensor, whole[axis.tensor].detach())
            gone = torch.ones(axis.size, dtype=torch.bool)
            gone[_index(axis, stays)] = False
            zeroed[axis.tensor] = value.index_fill(axis.dim, gone.nonzero()[:, 0].to(value.device), 0)
    return _around(model, {id(whole[name]): _like(whole[name], value) for name, value in zeroed.items()})


@torch.no_grad()
def difference(model: nn.Module, units: Units, kept: Kept, example: Example) -> float:
    """Largest absolute difference between the outputs of the cut and of the masked model, on `example`.

    Raises StropError where the cut model does not run, or as `channels` does.
    """
    thin = outputs(cut(model, units, kept), example, "the cut model")
    dense = outputs(masked(model, units, kept), example)
    if [value.shape for value in thin] != [value.shape for value in dense]:
        raise StropError("the cut model's output has another shape: its units are not those of this model")
    return max((float((a.double() - b.double()).abs().max()) for a, b in zip(thin, dense, strict=True)))


def removed(model: nn.Module, units: Units, counts: Mapping[str, int]) -> int:
    """Parameters that go when each unit named keeps as many channels as `counts` says, exactly."""
    parameters = dict(model.named_parameters())
    sizes = {name: [*parameter.shape] for name, parameter in parameters.items()}
    for name, count in counts.items():
        unit = units[name]
        for axis in unit.axes:
            if axis.tensor in sizes:
                shape = sizes[axis.tensor]
                shape[axis.dim] = shape[axis.dim] * count // unit.width
    return sum(parameters[name].numel() - torch.Size(shape).numel() for name, shape in sizes.items())


def channels(unit: Unit, indices: Tensor) -> Tensor:
    """The channels that stay, as `[heads, kept in each]`, numbered within each head.

    Raises StropError unless they ascend, are the unit's, and are equally many in every head.
    """
    indices = torch.as_tensor(indices).long().cpu()
    each = unit.width // unit.heads
    ascending = indices.dim() == 1 and len(indices) > 0 and bool((indices.diff() > 0).all())
    if not ascending or indices[0] < 0 or indices[-1] >= unit.width:
        raise StropError(
            f"the channels to keep of {unit.name} must be one or more ascending numbers of 0 to "
            f"{unit.width - 1}"
        )
    counts = (indices // each).bincount(minlength=unit.heads)
    if (counts != counts[0]).any():
        raise StropError(
            f"{unit.name} must keep equally many channels in each of its {unit.heads} heads, not "
            f"{counts.tolist()}"
        )
    return (indices % each).view(unit.heads, -1)


def _index(axis: Axis, stays: Tensor) -> Tensor:
    """Which entries of an axis stay, in their new order, when its unit keeps the channels `[heads, each]`."""
    grid = torch.arange(axis.size).view(axis.factors)
    if len(axis.own) == 1:
        return grid.index_select(axis.own[0], stays[0]).flatten()
    heads, width = axis.own
    shape = [1] * grid.dim()
    shape[heads], shape[width] = stays.shape
    return grid.take_along_dim(stays.reshape(shape), width).flatten()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, module by module; one that is shared has its first name."""
    named = {
        f"{path}.{name}" if path else name: tensor
        for path, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    first = {id(tensor): name for name, tensor in reversed(named.items())}
    return {name: tensor for name, tensor in named.items() if first[id(tensor)] == name}


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _around(model: nn.Module, instead: Mapping[int, Tensor]) -> nn.Module:
    """The model's modules once more, around its own tensors or, by id, around others."""
    return copy.deepcopy(model, {id(t): instead.get(id(t), t) for t in tensors(model).values()})


def _held(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _resize(before: nn.Module, after: nn.Module, stay: Mapping[int, Tensor]) -> None:
    """Make the numbers that a module keeps of its own sizes true again."""
    groups = None
    if isinstance(after, _ConvNd) and (rows := stay.get(id(before.weight))) is not None:
        groups = len((rows // (len(before.weight) // before.groups)).unique())
    resize(after, groups)


def outputs(model: nn.Module, example: Example, called: str = "the model") -> list[Tensor]:
    """The floating-point tensors that a model gives, in evaluation mode.

    Raises StropError where it does not run on the example.
    """
    with evaluating(model):
        try:
            given = model(**example)
        except Exception as error:
            raise StropError(f"{called} does not run on the example: {reason(error)}") from error
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, then in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
