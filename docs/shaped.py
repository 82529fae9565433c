"""Checkpoints of real shapes and random weights, written shard by shard: what is measured on.

A folder has the layers of a published Qwen3 model under the names of its checkpoints, in bfloat16, from a
fixed seed, with the bundled coder's tokenizer. No more than a shard is in memory.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from strop.core.checkpoint import INDEX
from strop.core.hooks import decoder_layers
from strop.models.zoo import zoo_path
from strop.weights import experts

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "bos_token_id": None,
    "eos_token_id": 0,
    "dtype": torch.bfloat16,
}


def dense(layers: int) -> PreTrainedConfig:
    """Layers of Qwen3-0.6B, 31 MB each."""
    return Qwen3Config(
        **COMMON,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )


def mixture(layers: int, count: int = 128, vocabulary: int = 151_936) -> PreTrainedConfig:
    """Layers of Qwen3-30B-A3B, 1.2 GB each with all experts, and its embeddings."""
    return Qwen3MoeConfig(
        **COMMON | {"vocab_size": vocabulary},
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=count,
        num_experts_per_tok=8,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        tie_word_embeddings=False,
    )


def layer_bytes(config: PreTrainedConfig) -> int:
    """Bytes of one decoder layer in 16 bits."""
    with torch.device("meta"):
        layer = decoder_layers(AutoModelForCausalLM.from_config(config))[0]
    return 2 * sum(weight.numel() for weight in layer.parameters())


def has_experts(folder: Path) -> bool:
    """Whether a folder holds a mixture of experts."""
    return bool(experts.has_experts(json.loads((folder / "config.json").read_text())))


def write(config: PreTrainedConfig, folder: Path, shard_bytes: int) -> int:
    """Write the folder; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    told = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    told["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(told, indent=1))
    for name in TOKENIZER:
        shutil.copyfile(zoo_path("coder") / name, folder / name)
    experts.split_experts(model)
    weight_map: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    size = 0
    for name, tensor in _drawn(model):
        held[name] = tensor
        if sum(kept.nbytes for kept in held.values()) >= shard_bytes:
            size += _flush(folder, held, weight_map)
    size += _flush(folder, held, weight_map)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    return size


def _drawn(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    tied = model.config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if weight.ndim == 1:
            yield name, torch.ones(weight.shape, dtype=torch.bfloat16)
        elif not (tied and name == "lm_head.weight"):
            yield name, torch.empty(weight.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)


def _flush(folder: Path, held: dict[str, Tensor], weight_map: dict[str, str]) -> int:
    if not held:
        return 0
    file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
    save_file(held, folder / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(held, file)
    size = sum(kept.nbytes for kept in held.values())
    held.clear()
    return size
