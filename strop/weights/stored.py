"""A checkpoint's weights under the names that the model gives them, read from its shards when needed.

Each read maps the part of a shard that it wants, so a checkpoint of any size takes the memory of one layer.
Left out: layouts that neither the model's own names nor the table below describe.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from strop.core.causal import FROM_FOLDER, not_loaded
from strop.core.checkpoint import Checkpoint
from strop.core.errors import StropError, reason
from strop.core.heap import trim
from strop.core.hooks import decoder_layers
from strop.core.narrow import KEY, narrow
from strop.weights.experts import OTHER_NAMES, Experts, split_experts

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class Place(NamedTuple):
    """Where a weight is stored: a tensor, or one expert's part of a fused one."""

    name: str
    expert: int | None = None
    part: str = ""


class Stored:
    """The weights of `model`, a skeleton on the meta device with its experts split."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        """Raises StropError when a weight of the decoder layers is stored nowhere."""
        self.model = model
        self.shards: dict[str, Path] = {}
        for shard in checkpoint.shards:
            try:
                with safe_open(shard, "pt") as file:
                    self.shards |= dict.fromkeys(file.keys(), shard)
            except SafetensorError as error:
                raise StropError(f"cannot read {shard} ({reason(error)}): download it again") from error
        self.layers = next(n for n, m in model.named_modules() if m is decoder_layers(model))
        self.skeleton = model.state_dict()
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        self.places = {}
        for key in self.skeleton:
            place = self._spelled(key)
            if place is None and key not in tied:
                raise StropError(
                    f"{checkpoint.path} stores no weight {key}: is a shard missing from its index?"
                )
            if key.startswith(f"{self.layers}."):
                self.places[key] = place

    def read(self, key: str) -> Tensor:
        """A weight of the layers by its name in the model, in the model's dtype.

        Raises StropError for a shape unlike config.json's, or numbers that are no floating-point weights.
        """
        weight, expected = self.original(key), self.skeleton[key]
        if weight.shape != expected.shape:
            raise StropError(
                f"weight {key} is {tuple(weight.shape)} in the checkpoint and {tuple(expected.shape)} by its "
                "config.json: restore the original files"
            )
        if expected.is_floating_point() and not (weight.is_floating_point() and weight.itemsize > 1):
            raise StropError(
                f"weight {key} is stored as {str(weight.dtype).removeprefix('torch.')}: load the 16-bit "
                "checkpoint that it was made from"
            )
        return weight.to(expected.dtype)

    def original(self, key: str) -> Tensor:
        """A weight of the layers as it is stored."""
        name, expert, part = self.places[key]
        with safe_open(self.shards[name], "pt") as file:
            if expert is None:
                return file.get_tensor(name)
            one = file.get_slice(name)[expert]
        one = one.mT if self._transposed(key) else one
        return one if part == "down" else one.chunk(2)[part == "up"]

    def load(self, name: str, module: nn.Module) -> None:
        """Fill a module of the model from the shards."""
        state = {key: self.read(f"{name}.{key}") for key in module.state_dict()}
        module.load_state_dict(state, assign=True)

    def release(self, module: nn.Module) -> None:
        """Give a module's memory back, to the system too."""
        module.to("meta")
        trim()

    def matrix(self, name: str, layer: nn.Module) -> Tensor:
        """The matrix `[O, I]` of a layer."""
        weight = self.read(f"{name}.weight")
        return (weight if isinstance(layer, nn.Linear) else weight.T).contiguous()

    def rest(self) -> Iterator[tuple[str, Tensor]]:
        """Everything outside the decoder layers, under the names of the checkpoint."""
        taken = {place.name for place in self.places.values()}
        for name, shard in self.shards.items():
            if name not in taken:
                with safe_open(shard, "pt") as file:
                    yield name, file.get_tensor(name)

    def load_rest(self) -> None:
        """Fill everything outside the decoder layers, so that text can be embedded."""
        inside = {id(module) for module in decoder_layers(self.model).modules()}
        for name, module in self.model.named_modules():
            if id(module) in inside:
                continue
            for key, tensor in [*module.named_parameters(recurse=False)]:
                full = f"{name}.{key}".lstrip(".")
                if (place := self._spelled(full)) is not None and tensor.is_meta:
                    with safe_open(self.shards[place.name], "pt") as file:
                        weight = file.get_tensor(place.name).to(tensor.dtype)
                    setattr(module, key, nn.Parameter(weight, requires_grad=False))
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                _draw_buffers(name, module, self.model.config)

    def stored_name(self, layer: str) -> str:
        """How the checkpoint calls a linear layer of the model; experts by their own names."""
        place = self.places[f"{layer}.weight"]
        return layer if place.expert is not None else place.name.removesuffix(".weight")

    def _spelled(self, key: str) -> Place | None:
        prefix = f"{self.model.base_model_prefix}."
        names = [key, key.removeprefix(prefix), *(re.sub(ours, theirs, key) for ours, theirs in OTHER_NAMES)]
        for name in names:
            if name in self.shards:
                return Place(name)
        if match := EXPERT.fullmatch(key):
            experts, index, part = match.groups()
            fused = f"{experts}.down_proj" if part == "down" else f"{experts}.gate_up_proj"
            if fused in self.shards:
                return Place(fused, int(index), part)
        return None

    def _transposed(self, key: str) -> bool:
        experts = self.model.get_submodule(key.rsplit(".", 3)[0])
        return isinstance(experts, Experts) and experts.transposed


def skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """The checkpoint's model on the meta device, without weights, its experts split."""
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, **FROM_FOLDER)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or _dtype(checkpoint))
            if KEY in checkpoint.config:
                narrow(model, checkpoint.config[KEY])
    except StropError:
        raise
    except Exception as error:  # transformers raises many kinds for a config that cannot be
        raise not_loaded("config", checkpoint.path, error) from error
    split_experts(model)
    return model.eval()


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the first floating-point weight, for a config that names none."""
    with safe_open(checkpoint.shards[0], "pt") as file:
        found = (file.get_tensor(name).dtype for name in [*file.keys()])
        return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)


def _draw_buffers(name: str, module: nn.Module, config: Any) -> None:
    """Buffers that no checkpoint stores, such as rotary frequencies, by building their module again."""
    try:
        fresh = type(module)(config.get_text_config(decoder=True))
    except TypeError as error:
        raise StropError(
            f"{name} is a {type(module).__name__}, which strop cannot build without its weights: use a "
            "method that looks at no text, such as rtn"
        ) from error
    for key, buffer in fresh.named_buffers():
        setattr(module, key, buffer)
