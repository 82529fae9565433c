"""Packed layers in the form of compressed-tensors, which transformers and vLLM load unchanged.

The format is `pack-quantized`: int32 words of codes, scales, zero points and the original shape for each
layer, and a `quantization_config` with one group of layers a grid. Left out: 1 bit, zeros that are no whole
codes, and layers that are no `nn.Linear`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
)
from compressed_tensors.utils.match import is_match
from torch import Tensor, nn
from transformers import PreTrainedModel

from strop.core.errors import StropError, reason
from strop.weights.experts import OTHER_NAMES
from strop.weights.grid import Codes, Grid
from strop.weights.linear import PackedLinear

FORMAT = CompressionFormat.pack_quantized.value


def describe(grids: Mapping[str, Grid], others: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of linear layers by name, where `others` keep their 16 bits."""
    kinds: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        kinds.setdefault(grid, []).append(name)
    groups = {
        f"group_{index}": QuantizationScheme(targets=[*_targets(names)], weights=_args(grid), format=FORMAT)
        for index, (grid, names) in enumerate(kinds.items())
    }
    config = QuantizationConfig(
        config_groups=groups,
        format=FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(others),
    )
    return config.to_dict()


def state(name: str, layer: PackedLinear) -> dict[str, Tensor]:
    """The stored tensors of a packed layer `[O, I]`.

    `weight_packed` is `[O, ceil(I * bits / 32)]` int32, `weight_scale` `[O, I / group]`, `weight_shape` `[2]`
    int64, and `weight_zero_point` `[ceil(O * bits / 32), I / group]` int32 where the grid stores zeros.
    """
    middle, bits = 2 ** (layer.grid.bits - 1), layer.grid.bits
    found = {
        "weight_packed": pack_to_int32((layer.codes - middle).view(torch.int8), bits),
        "weight_scale": layer.scale,
        "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
    }
    if layer.zero is not None:
        zero = (layer.zero - middle).to(torch.int8)
        found["weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0)
    if layer.bias is not None:
        found["bias"] = layer.bias.detach()
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in found.items()}


def restore(tensors: Mapping[str, Tensor], name: str, layer: nn.Module, grid: Grid) -> PackedLinear:
    """The packed form of a linear layer from its stored tensors."""
    own = {
        key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")
    }
    bias = nn.Parameter(own["bias"], requires_grad=False) if "bias" in own else None
    return PackedLinear(_codes(own, grid, layer.weight.shape), grid, bias)


class Shell(nn.Module):
    """Where the stored tensors of a layer are loaded, before they become a `PackedLinear`."""

    def __init__(self, layer: nn.Module, grid: Grid) -> None:
        super().__init__()
        self.grid, self.shape = grid, layer.weight.shape
        outputs, inputs = self.shape
        groups, dtype = inputs // grid.width(inputs), layer.weight.dtype
        with torch.device("meta"):
            self.register_buffer(
                "weight_packed", torch.empty(outputs, _words(inputs, grid), dtype=torch.int32)
            )
            self.register_buffer("weight_scale", torch.empty(outputs, groups, dtype=dtype))
            self.register_buffer("weight_shape", torch.empty(2, dtype=torch.int64))
            if not grid.symmetric:
                words = torch.empty(_words(outputs, grid), groups, dtype=torch.int32)
                self.register_buffer("weight_zero_point", words)
        self.register_parameter("bias", layer.bias)

    def packed(self) -> PackedLinear:
        """The layer, once its tensors are there."""
        bias = None if self.bias is None else nn.Parameter(self.bias, requires_grad=False)
        return PackedLinear(_codes(self.state_dict(), self.grid, self.shape), self.grid, bias)


def grids_of(told: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Grid]:
    """The grid of each linear layer of `model` that a `quantization_config` names.

    Raises StropError for what `state` does not write.
    """
    try:
        config = QuantizationConfig.model_validate(dict(told))
        found = {}
        for scheme in config.config_groups.values():
            if scheme.input_activations is not None or (scheme.format or config.format) != FORMAT:
                raise StropError(
                    f"the checkpoint stores {scheme.format or config.format}, and strop reads {FORMAT} "
                    "weights with 16-bit activations: load it with transformers or vLLM"
                )
            for name, layer in model.named_modules():
                if _named(name, layer, scheme.targets) and not _named(name, layer, config.ignore):
                    found[name] = _grid(scheme.weights)
    except (ValueError, AttributeError, TypeError) as error:
        raise StropError(
            f"the quantization_config of the checkpoint is broken ({reason(error)}): restore it"
        ) from error
    return found


def _codes(own: Mapping[str, Tensor], grid: Grid, shape: Sequence[int]) -> Codes:
    outputs, inputs = shape
    middle, scale = 2 ** (grid.bits - 1), own["weight_scale"].detach()
    words = unpack_from_int32(own["weight_packed"], grid.bits, torch.Size([outputs, inputs]))
    zero = None
    if not grid.symmetric:
        size = torch.Size([outputs, scale.shape[1]])
        whole = unpack_from_int32(own["weight_zero_point"], grid.bits, size, packed_dim=0)
        zero = (whole.to(torch.int16) + middle).to(scale.dtype)
    return Codes(words.view(torch.uint8) + middle, scale, zero)


def _named(name: str, layer: nn.Module, targets: Iterable[str]) -> bool:
    """Whether a layer of the model, or its name in checkpoints, is among `targets`."""
    names = (name, *(re.sub(ours, theirs, f"{name}.").rstrip(".") for ours, theirs in OTHER_NAMES))
    return isinstance(layer, nn.Linear) and any(is_match(name, layer, targets) for name in names)


def _words(count: int, grid: Grid) -> int:
    """How many int32 words hold `count` codes."""
    with torch.device("cpu"):
        return pack_to_int32(torch.zeros(1, count, dtype=torch.int8), grid.bits).shape[1]


def _args(grid: Grid) -> QuantizationArgs:
    strategy = QuantizationStrategy.CHANNEL if grid.group is None else QuantizationStrategy.GROUP
    return QuantizationArgs(
        num_bits=grid.bits, strategy=strategy, group_size=grid.group, symmetric=grid.symmetric
    )


def _grid(args: QuantizationArgs) -> Grid:
    group = args.group_size if args.strategy == QuantizationStrategy.GROUP else None
    return Grid(args.num_bits, group, args.symmetric)


def _targets(names: Iterable[str]) -> Iterator[str]:
    """Layers by name, the experts of a decoder layer by one pattern."""
    found: dict[str, set[str]] = {}
    for name in names:
        experts, _, rest = name.partition(".experts.")
        if rest:
            found.setdefault(experts, set()).add(rest.partition(".")[2])
        else:
            yield name
    for experts, parts in found.items():
        yield rf"re:^{re.escape(experts)}\.experts\.\d+\.({'|'.join(sorted(parts))})$"
