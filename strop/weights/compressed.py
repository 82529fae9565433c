"""Write a packed model as a compressed-tensors folder that transformers and vLLM load unchanged.

The format is `pack-quantized`: int32 words of codes, scales and the original shape for each layer,
and a `quantization_config` in config.json. The folder appears whole or not at all. Left out: models
whose layers differ in width or group, and layers that are no `nn.Linear`.
"""

import os
import tempfile
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
)
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strop.core.errors import StropError
from strop.weights.linear import PackedConv1D, PackedLinear


def export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | os.PathLike
) -> Path:
    """Save `model`, packed by a weight method, with its configuration and tokenizer to `folder`.

    Everything is written to a hidden sibling first and renamed when complete. Raises StropError if
    `folder` exists and is not empty, or if compressed-tensors cannot say what `model` is.
    """
    target = Path(folder).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise StropError(f"{folder} exists already: choose a new folder for the export")
    config = quantization_config(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        draft = Path(scratch) / target.name
        model.save_pretrained(draft, state_dict=checkpoint(model))
        ModelCompressor(quantization_config=config).update_config(str(draft))
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        os.replace(draft, target)
    return target


def quantization_config(model: PreTrainedModel) -> QuantizationConfig:
    """Describe the packed layers of `model`, which share one bit width and one group.

    Raises StropError if they do not, if there is none, or if one took the place of a `Conv1D`.
    """
    layers = _packed(model)
    if not layers:
        raise StropError("export found no packed layer: apply a weight method to the model first")
    for name, layer in layers.items():
        if isinstance(layer, PackedConv1D):
            raise StropError(
                f"{name} is a Conv1D, which compressed-tensors cannot describe: "
                f"{type(model).__name__} runs packed in memory but has no export"
            )
    per_channel = all(layer.scale.shape[-1] == 1 for layer in layers.values())
    schemes = {(layer.bits, None if per_channel else layer.group) for layer in layers.values()}
    if len(schemes) > 1:
        raise StropError(
            f"export writes one (bits, group) and this model has {sorted(schemes)}: "
            "use the same for every layer"
        )
    bits, group = schemes.pop()
    weights = QuantizationArgs(
        num_bits=bits,
        strategy=QuantizationStrategy.CHANNEL if per_channel else QuantizationStrategy.GROUP,
        group_size=group,
    )
    form = CompressionFormat.pack_quantized.value
    return QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights, format=form)},
        format=form,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
    )


def checkpoint(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of `model` with its packed layers under the names of compressed-tensors.

    A layer `[O, I]` becomes `weight_packed` `[O, ceil(I * bits / 32)]` int32, `weight_scale`
    `[O, I / group]` and `weight_shape` `[2]` int64.
    """
    state = model.state_dict()
    for name, layer in _packed(model).items():
        del state[f"{name}.packed"]
        state[f"{name}.weight_packed"] = pack_to_int32(layer.integers, layer.bits)
        state[f"{name}.weight_scale"] = state.pop(f"{name}.scale")
        state[f"{name}.weight_shape"] = torch.tensor([layer.out_features, layer.in_features])
    return state


def _packed(model: PreTrainedModel) -> dict[str, PackedLinear]:
    return {name: mod for name, mod in model.named_modules() if isinstance(mod, PackedLinear)}
