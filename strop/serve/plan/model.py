"""What a model needs of devices: bytes of a block, of its head, of KV, and of what stages send on.

Read from a config.json, exactly from the headers of a folder's safetensors, or typed in. All blocks are of
one size, as in arXiv 2606.03770; their types may differ in time and in how many tokens they keep.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop.core.errors import UNREAD, StropError, quoted, reason
from strop.serve.plan.devices import mapping, quantity

MOST_BLOCKS = 160
"""A search takes time and memory with their square: above, hours and gigabytes."""
FULL, SLIDING = "full_attention", "sliding_attention"
BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "I64": 8,
    "I32": 4,
}
"""Of a number; of the other types of safetensors it is 1, or 2 for 16-bit integers."""
QUANTIZED_BITS = {"mxfp4": 4.25, "fp8": 8.0}
"""Bits of a weight of blocks, scales included, where a config names the method alone."""
TYPED = ("blocks", "hidden", "kv_heads", "head_dim", "block", "head")
OPTIONAL = ("ffn", "name")
BLOCK = re.compile(r"\b(?:layers|h|blocks|block)\.(\d+)\.")
FFN = re.compile(r"\b(?:mlp|ffn|feed_forward|block_sparse_moe|experts)\b")


@dataclass(frozen=True)
class ModelShape:
    """A decoder of equal blocks."""

    name: str
    types: tuple[str, ...]
    """The layer type of each block."""
    activation_bytes: float
    """Of a token between two blocks."""
    kv_block_bytes: float
    """KV of a token in one block."""
    block_bytes: float
    """Weights of a block."""
    ffn_bytes: float
    """What of a block may lie in RAM."""
    head_bytes: float
    """Embedding, head and output layer, which the master has."""
    window: int | None = None
    """Tokens that a sliding block keeps."""

    def __post_init__(self) -> None:
        sizes = (self.activation_bytes, self.kv_block_bytes, self.block_bytes)
        if not self.types or not all(0 < size < math.inf for size in sizes):
            raise StropError(f"{self.name} needs at least one block, and sizes above 0 bytes")
        if not (0 <= self.ffn_bytes <= self.block_bytes and 0 <= self.head_bytes < math.inf):
            raise StropError(f"{self.name}: ffn lies within a block, and no size is negative")

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self.types)

    @property
    def weight_bytes(self) -> float:
        """All weights."""
        return self.blocks * self.block_bytes + self.head_bytes

    def kept(self, tokens: float) -> list[float]:
        """KV bytes that each block keeps of a sequence."""
        window = math.inf if self.window is None else self.window
        return [
            self.kv_block_bytes * (min(tokens, window) if kind == SLIDING else tokens) for kind in self.types
        ]


def read_model(source: str) -> ModelShape:
    """A folder, a config.json, or `blocks=24,hidden=2880,kv_heads=8,head_dim=64,block=476MB,head=2.3GB`.

    Typed sizes take units; `ffn` is what of a block may be offloaded, 0 by default. Activations and KV are of
    2 bytes a number there. Raises StropError where anything is missing or contradicts itself.
    """
    if "=" in source:
        return _typed(source)
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StropError(
            f"cannot read {file} ({error.strerror}): give a folder with a config.json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise StropError(f"{file} is not valid JSON ({reason(error)}): restore the original file") from error
    if not isinstance(config, dict):
        raise StropError(f"{file} is no config of a model: it holds no mapping")
    text = config.get("text_config")
    told = config | text if isinstance(text, dict) else config
    shards = sorted(file.parent.glob("*.safetensors")) if path.is_dir() else []
    name = path.resolve().name if path.is_dir() else file.resolve().parent.name
    try:
        return from_config(told, name, _stored(shards) if shards else None)
    except UNREAD as error:
        raise StropError(f"{file} is no config of a decoder ({reason(error)}): restore the file") from error


def from_config(
    config: Mapping[str, Any], name: str, stored: tuple[float, float, float] | None = None
) -> ModelShape:
    """From a config's fields; `stored` are bytes of a block, its feed-forward part and the head."""
    blocks = _count(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if blocks > MOST_BLOCKS:
        raise StropError(f"{name} has {blocks} blocks by its config, and {MOST_BLOCKS} are the most to plan")
    hidden = _count(config, "hidden_size", "n_embd", "d_model")
    heads = _count(config, "num_attention_heads", "n_head")
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    itemsize = BYTES.get(dtype, 2)
    kv = 2 * kv_heads * head_dim
    if config.get("kv_lora_rank"):  # multi-head latent attention keeps the latent and the rotary part
        kv = config["kv_lora_rank"] + config.get("qk_rope_head_dim", 0)
    types = tuple(config.get("layer_types") or [FULL] * blocks)
    if len(types) != blocks:
        raise StropError(
            f"config of {name} has {blocks} layers and {len(types)} layer_types: restore the file"
        )
    block, ffn, head = stored or _counted(config, hidden, heads * head_dim, kv_heads * head_dim, itemsize)
    window = config.get("sliding_window") if SLIDING in types else None
    return ModelShape(name, types, hidden * itemsize, kv * itemsize, block, ffn, head, window)


def _counted(
    config: Mapping[str, Any], hidden: int, q: int, kv: int, itemsize: float
) -> tuple[float, float, float]:
    """Bytes of a block, its feed-forward part and the head, by the usual shapes (gated unless GPT-2's)."""
    inner = config.get("moe_intermediate_size") or config.get("intermediate_size") or config.get("n_inner")
    experts = next((config[key] for key in ("num_local_experts", "num_experts", "n_routed_experts")
                    if config.get(key)), 1)  # fmt: skip
    gated = 2 if config.get("model_type") in ("gpt2", "opt", "gpt_neox") else 3
    ffn = experts * gated * hidden * (inner or 4 * hidden)
    bits = _bits(config.get("quantization_config"), 8 * itemsize)
    attention = (2 * q + 2 * kv) * hidden
    only_experts = experts > 1  # quantizers of experts leave attention alone
    attention_bits = 8 * itemsize if only_experts else bits
    vocabulary = _count(config, "vocab_size") * hidden * itemsize
    tied = config.get("tie_word_embeddings", False)
    return (
        (attention * attention_bits + ffn * bits) / 8,
        ffn * bits / 8,
        vocabulary * (1 if tied else 2),
    )


def _bits(quantization: Any, plain: float) -> float:
    if not isinstance(quantization, dict):
        return plain
    method = str(quantization.get("quant_method"))
    bits = quantization.get("bits") or QUANTIZED_BITS.get(method)
    if not isinstance(bits, (int, float)):
        raise StropError(
            f"the config does not say how many bits {quoted(method)} takes: give the folder with its "
            "weights, or type the sizes (blocks=24,hidden=2880,...)"
        )
    return float(bits)


def _stored(shards: list[Path]) -> tuple[float, float, float]:
    """The same from the headers of safetensors files: the largest block stands for all."""
    from safetensors import SafetensorError, safe_open

    blocks: Counter[str] = Counter()
    ffn: Counter[str] = Counter()
    head = 0.0
    for shard in shards:
        try:
            with safe_open(shard, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(name)
                    size = math.prod(part.get_shape()) * BYTES.get(
                        part.get_dtype(), 1 + ("16" in part.get_dtype())
                    )
                    match = BLOCK.search(name)
                    if match is None:
                        head += size
                        continue
                    blocks[match[1]] += size
                    ffn[match[1]] += size * bool(FFN.search(name))
        except SafetensorError as error:
            raise StropError(f"{shard} is truncated or not a safetensors file: download it again") from error
    if not blocks:
        raise StropError(
            f"{shards[0].parent} holds no block under a usual name: type the sizes (blocks=24,...)"
        )
    return max(blocks.values()), min(ffn[key] for key in blocks), head


def _count(config: Mapping[str, Any], *names: str) -> int:
    found = next((config[name] for name in names if name in config), None)
    if type(found) is not int or not 1 <= found < 1 << 31:
        raise StropError(
            f"the config has no {names[0]} of at least 1: give another, or type blocks=24,hidden=..."
        )
    return found


def _typed(source: str) -> ModelShape:
    pairs = [part.partition("=") for part in source.split(",")]
    said = mapping({key.strip(): value.strip() for key, _, value in pairs}, "--model", TYPED, OPTIONAL)
    counts = {}
    for key in TYPED[:4]:
        most = MOST_BLOCKS if key == "blocks" else 10**6
        if not said[key].isdecimal() or not 1 <= int(said[key][:9]) <= most:
            raise StropError(f"--model: {key} is a whole number from 1 to {most}, got {quoted(said[key])}")
        counts[key] = int(said[key])
    sizes = {key: _size(key, said.get(key, "0")) for key in ("block", "ffn", "head")}
    return ModelShape(
        said.get("name", "typed"),
        (FULL,) * counts["blocks"],
        2 * counts["hidden"],
        4 * counts["kv_heads"] * counts["head_dim"],
        sizes["block"],
        sizes["ffn"],
        sizes["head"],
    )


def _size(key: str, text: str) -> float:
    try:
        return quantity(f"--model: {key}", float(text), "bytes")
    except ValueError:
        return quantity(f"--model: {key}", text, "bytes")
