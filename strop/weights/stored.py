"""A checkpoint's weights under the names that the model gives them, read from its shards when needed.

Each read maps the part of a shard that it wants, so a checkpoint of any size takes the memory of one layer.
Left out: layouts that neither the model's own names nor the table below describe.
"""

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from strop.core.causal import FROM_FOLDER
from strop.core.checkpoint import Checkpoint
from strop.core.errors import StropError
from strop.core.hooks import decoder_layers
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
            with safe_open(shard, "pt") as file:
                self.shards |= dict.fromkeys(file.keys(), shard)
        self.layers = next(n for n, m in model.named_modules() if m is decoder_layers(model))
        whole = model.state_dict()
        self.shapes = {key: whole[key].shape for key in whole if key.startswith(f"{self.layers}.")}
        self.places = {key: self._find(key, checkpoint.path) for key in self.shapes}

    def read(self, key: str) -> Tensor:
        """A weight of the model by its name there. Raises StropError for a shape unlike config.json's."""
        weight, expected = self._read(key), self.shapes.get(key)
        if expected is not None and weight.shape != expected:
            raise StropError(
                f"weight {key} is {tuple(weight.shape)} in the checkpoint and {tuple(expected)} by its "
                "config.json: restore the original files"
            )
        return weight

    def _read(self, key: str) -> Tensor:
        name, expert, part = self.places[key] if key in self.places else self._find(key, Path())
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
        """Give a module's memory back, to the system too: glibc would keep pieces, more with every layer."""
        module.to("meta")
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)

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
                        setattr(module, key, nn.Parameter(file.get_tensor(place.name), requires_grad=False))
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                _draw_buffers(name, module, self.model.config)

    def stored_name(self, layer: str) -> str:
        """How the checkpoint calls a linear layer of the model; experts by their own names."""
        place = self.places[f"{layer}.weight"]
        return layer if place.expert is not None else place.name.removesuffix(".weight")

    def _find(self, key: str, path: Path) -> Place:
        found = self._spelled(key)
        if found is None:
            raise StropError(f"{path} stores no weight {key}: is a shard missing from its index?")
        return found

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
    config = AutoConfig.from_pretrained(checkpoint.path, **FROM_FOLDER)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    split_experts(model)
    return model.eval()


def _draw_buffers(name: str, module: nn.Module, config: Any) -> None:
    """Buffers that no checkpoint stores, such as rotary frequencies, by building their module again."""
    try:
        fresh = type(module)(config.get_text_config(decoder=True))
    except TypeError as error:
        raise StropError(
            f"{name} is a {type(module).__name__}, which strop cannot build layer by layer: use a method "
            "without calibration, or a machine that holds the whole model"
        ) from error
    for key, buffer in fresh.named_buffers():
        setattr(module, key, buffer)
