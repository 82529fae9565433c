"""Models narrower than their config says, as structured pruning leaves them.

The config keeps the architecture, and beside it, under `strop_prune`, the shapes of tensors that differ from
it. `narrow` gives a module these shapes; `class_of` gives transformers a class that does so when it is built,
so that `from_pretrained` reads such a folder like any other.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from strop.core.errors import StropError, quoted, reason

KEY = "strop_prune"
"""In config.json."""
VERSION = 1


def record(dense: nn.Module, thin: nn.Module, before: Any = None) -> dict[str, Any]:
    """What config.json says under `KEY` of `thin`, which was cut out of `dense`, itself told by `before`."""
    shapes, groups = ({}, {}) if before is None else _parts(before)
    whole = dict(_tensors(dense))
    for name, tensor in _tensors(thin):
        if tensor.shape != whole[name].shape:
            shapes[name] = [*tensor.shape]
    for name, module in thin.named_modules():
        if isinstance(module, _ConvNd) and f"{name}.weight" in shapes and module.groups > 1:
            groups[name] = module.groups
    return {"version": VERSION, "shapes": shapes, "groups": groups}


def narrow(model: nn.Module, told: Any) -> None:
    """Give the tensors of a module, in place, the shapes that `record` has told; their values are lost.

    Raises StropError for what `record` does not tell of such a module.
    """
    shapes, groups = _parts(told)
    holders: dict[int, list[tuple[nn.Module, dict[str, Any], str]]] = {}
    for module in model.modules():
        parts: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in parts:
            for key, tensor in held.items():
                if tensor is not None:
                    holders.setdefault(id(tensor), []).append((module, held, key))
    whole = dict(_tensors(model))
    for name, shape in shapes.items():
        if name not in whole or not _fits(shape, whole[name].shape):
            raise StropError(
                f"{KEY} in the config says {quoted(name)} is {quoted(shape)}, to which no "
                f"{type(model).__name__} of this config can be cut: restore config.json"
            )
        old = whole[name]
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        for _, held, key in holders[id(old)]:
            held[key] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    touched = {id(module): module for name in shapes for module, _, _ in holders[id(whole[name])]}
    names = {id(module): name for name, module in model.named_modules()}
    for module in touched.values():
        resize(module, groups.get(names[id(module)]))


def resize(module: nn.Module, groups: int | None = None) -> None:
    """Make the numbers true that a module keeps of the sizes of its own tensors."""
    match module:
        case nn.Linear():
            module.out_features, module.in_features = module.weight.shape
        case Conv1D():
            module.nx, module.nf = module.weight.shape
        case nn.Embedding():
            module.num_embeddings, module.embedding_dim = module.weight.shape
        case _ConvNd():
            module.groups = module.groups if groups is None else groups
            ends = module.weight.shape[0], module.weight.shape[1] * module.groups
            module.in_channels, module.out_channels = ends if module.transposed else ends[::-1]
        case _NormBase():
            module.num_features = len(next(t for t in (module.weight, module.running_mean) if t is not None))


def refuse_packed(told: Mapping[str, Any]) -> None:
    """Raise StropError for a config.json of quantized weights, whose codes no channel can be cut out of."""
    if told.get("quantization_config") is not None:
        raise StropError(
            "this checkpoint is quantized already: prune the 16-bit checkpoint that it was made from, and "
            "quantize what comes of it"
        )


def class_of(auto: Any, path: Path, told: Mapping[str, Any], config: Any = None, **options: Any) -> Any:
    """What builds the model of a folder whose config.json is `told`: `auto` itself, or a narrower class.

    `auto` is one of transformers' classes that choose a class; `config` replaces the folder's.
    """
    if KEY not in told:
        return auto
    config = AutoConfig.from_pretrained(path, **options) if config is None else config
    try:
        base: Any = auto._model_mapping[type(config)]
    except KeyError as error:
        raise StropError(
            f"{path} holds a pruned {config.model_type}, not what {auto.__name__} reads"
        ) from error

    def built(self: Any, config: Any, *given: Any, **named: Any) -> None:
        base.__init__(self, config, *given, **named)
        narrow(self, told[KEY])

    # the name and the home stay, since transformers looks a class up in the source of its module
    return type(base.__name__, (base,), {"__init__": built, "__module__": base.__module__})


def _parts(told: Any) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Shapes and groups. Raises StropError for anything that `record` does not write."""
    try:
        if told["version"] != VERSION:
            raise StropError(
                f"the pruned model has version {quoted(told['version'])} of its format: update strop"
            )
        shapes = {str(name): [_size(n) for n in shape] for name, shape in told["shapes"].items()}
        return shapes, {str(name): _size(n) for name, n in told["groups"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StropError(
            f"{KEY} in the config is not what `strop prune` writes ({reason(error)}): restore config.json"
        ) from error


def _size(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{quoted(value)} is no size")
    return value


def _fits(shape: list[int], whole: torch.Size) -> bool:
    return len(shape) == len(whole) and all(n <= most for n, most in zip(shape, whole, strict=True))


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, one that is shared by its first name."""
    return [*model.named_parameters(), *model.named_buffers()]
