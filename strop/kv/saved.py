"""Packed caches in files: read a long prompt once, continue from it as often as you like.

A safetensors file with every layer's tensors; its metadata name the method with all its fields, the shape of
the model and the number of tokens, and a cache is loaded only where they match. That the weights are those
that wrote it is for the caller to see to.

Not covered: layers that carry a state instead of keys and values.
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from strop.core.cache import AttendingLayer, KVCache
from strop.core.errors import StropError, reason
from strop.core.files import atomic
from strop.core.method import Method
from strop.kv.base import KVMethod, KVShape

FORMAT = "strop kv cache 1"


def save_cache(cache: KVCache, path: Path) -> None:
    """Write a cache, whole or not at all.

    Raises StropError when the cache is empty or has a layer that cannot be saved.
    """
    if cache.get_seq_length() == 0:
        raise StropError("this cache is empty: read a prompt into it before saving it")
    tensors = {
        f"{index}.{name}": tensor.detach().contiguous()
        for index, layer in enumerate(cache.layers)
        for name, tensor in _state(layer).items()
    }
    metadata = {"format": FORMAT, "seen": str(cache.get_seq_length())} | _identity(cache.method, cache.config)
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_cache(
    path: Path, method: KVMethod, config: PretrainedConfig, device: torch.device | str = "cpu"
) -> KVCache:
    """The cache in a file, as a cache of `method` for a model of this config.

    Raises StropError when the file is missing, broken or no cache, or when `method` or the model's shape
    differ from those that wrote it.
    """
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            _require_match(path, metadata, _identity(method, config))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StropError(f"cannot read a cache from {path}: {reason(error)}") from error
    cache = method.new_cache(config)
    try:
        for index, layer in enumerate(cache.layers):
            mine = {name: x for name, x in tensors.items() if name.startswith(f"{index}.")}
            _restore(layer, {name.partition(".")[2]: x for name, x in mine.items()}, int(metadata["seen"]))
        cache.check()
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise StropError(f"{path} is damaged ({' '.join(repr(error).split())}): write it again") from error
    return cache


def _require_match(path: Path, metadata: dict[str, str], identity: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise StropError(f"{path} is not a {FORMAT} file: write it with strop.kv.save_cache")
    for name, wanted in identity.items():
        if metadata.get(name) != wanted:
            raise StropError(f"{path} was written for the {name} {metadata.get(name)}, and this is {wanted}")


def _identity(method: Method, config: PretrainedConfig) -> dict[str, str]:
    """What must be the same where a cache is written and where it is loaded."""
    decoder = config.get_text_config(decoder=True)
    shape = dataclasses.asdict(KVShape.of(config))
    del shape["itemsize"]
    model = {"type": decoder.model_type, "hidden": decoder.hidden_size, **shape}
    return {"method": repr(method), "model": json.dumps(model)}


def _state(layer: CacheLayerMixin) -> dict[str, Tensor]:
    if isinstance(layer, AttendingLayer):
        return layer.state()
    if type(layer) is not DynamicSlidingWindowLayer:
        raise StropError(
            f"a {type(layer).__name__} carries a state that a file cannot hold: keep this cache in memory"
        )
    recent = slice(-(layer.sliding_window - 1), None)
    return {"keys": layer.keys[:, :, recent], "values": layer.values[:, :, recent]}


def _restore(layer: CacheLayerMixin, state: dict[str, Tensor], seen: int) -> None:
    if isinstance(layer, AttendingLayer):
        layer.restore(state)
        if layer.seen != seen:
            raise ValueError(f"a layer holds {layer.seen} tokens of {seen}")
        return
    layer.lazy_initialization(state["keys"], state["values"])
    layer.keys, layer.values, layer.cumulative_length = state["keys"], state["values"], seen
    if layer.keys.shape[2] != min(seen, layer.sliding_window - 1):
        raise ValueError("a window is not full")
