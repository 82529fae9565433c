"""A checkpoint folder looked at before anything is loaded: safetensors only, whole, and small enough.

Not covered: whether the numbers are finite; the loader looks at those once they are in memory.
"""

import json
import math
import os
from dataclasses import dataclass
from hashlib import blake2b, file_digest
from operator import index as whole
from pathlib import Path

import psutil

from strop.core.errors import StropError, quoted, reason

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
TOLD = (
    "config.json",
    "generation_config.json",
    *TOKENIZERS,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files besides weights that change what a model writes."""
INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100 << 20
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configs call the number of layers."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder that transformers can load."""

    path: Path
    config: dict
    shards: tuple[Path, ...]
    elements: int
    """Stored numbers in all shards."""
    bytes: int
    """Bytes of all shards."""

    def fingerprint(self) -> str:
        """16 hex digits that name all that decides what the model writes: weights, config, tokenizer."""
        hasher = blake2b(digest_size=8)
        told = (self.path / name for name in TOLD)
        for path in (*filter(Path.is_file, told), *self.shards):
            with path.open("rb") as file:
                hasher.update(path.name.encode() + file_digest(file, blake2b).digest())
        return hasher.hexdigest()


def inspect(path: Path) -> Checkpoint:
    """Look at a checkpoint folder without loading it.

    Raises StropError when the folder, its config or its tokenizer is missing, when it holds pickles only, or
    when a safetensors file is truncated.
    """
    if not os.path.isdir(path):
        raise StropError(f"no model folder at {path}: give a checkpoint folder or zoo:NAME")
    config = _config(path)
    if "dflash_config" in config:
        raise StropError(
            f"{path} holds a drafter, which is no language model by itself: give the model that it drafts "
            "for, and the drafter to --draft"
        )
    shards = _shards(path)
    if not shards:
        if any(next(path.glob(pattern), None) for pattern in PICKLES):
            raise StropError(
                f"{path} holds pickled weights only, which can run code when loaded: convert them with "
                "save_pretrained(..., safe_serialization=True) in an environment you trust"
            )
        raise StropError(f"{path} holds no .safetensors file: is the download complete?")
    if not any((path / name).exists() for name in TOKENIZERS):
        raise StropError(
            f"{path} has no tokenizer ({', '.join(TOKENIZERS)}): copy the tokenizer files of the original "
            "model into the folder"
        )
    sizes = [size for shard in shards for size in _sizes(shard)]
    _require_layers(path, config, len(sizes))
    return Checkpoint(path, config, shards, sum(sizes), sum(s.stat().st_size for s in shards))


def _config(path: Path) -> dict:
    file = path / "config.json"
    if not file.exists():
        raise StropError(f"{path} has no config.json, so it is not a transformers checkpoint folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StropError(f"{file} is not valid JSON ({reason(error)}): restore the original file") from error
    if isinstance(config, dict) and isinstance(config.get("model_type"), str):
        return config
    told = config.get("architecture") if isinstance(config, dict) else None
    if isinstance(told, str):
        raise StropError(
            f"{path} holds a {quoted(told)}, not a causal language model that transformers runs: give a "
            "decoder such as Qwen3, Llama, Mistral, Gemma or GPT-2"
        )
    raise StropError(f"{file} names no model_type, so transformers cannot tell the architecture")


def _shards(path: Path) -> tuple[Path, ...]:
    """The files that transformers will read; a folder may hold the same weights in another form as well."""
    index, single, present = path / INDEX, path / "model.safetensors", sorted(path.glob("*.safetensors"))
    if single.exists() or not index.exists():
        return (single,) if single.exists() else tuple(present)
    try:
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not all(isinstance(name, str) for name in wanted):
            raise TypeError("a shard without a name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StropError(f"{index} is not a valid shard index: restore the original file") from error
    missing = sorted(wanted - {shard.name for shard in present})
    if missing:
        first = quoted(missing[0])
        raise StropError(f"{path} lacks {len(missing)} shard(s), first {first}: download it again")
    return tuple(shard for shard in present if shard.name in wanted)


def _sizes(shard: Path) -> list[int]:
    """Numbers in each tensor of a safetensors file, whose length must be what its header says."""
    size = shard.stat().st_size
    broken = StropError(f"{shard} is truncated or not a safetensors file: download it again")
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, HEADER_LIMIT):
            raise broken
        try:
            header = json.loads(file.read(length))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            end = max((entry["data_offsets"][1] for entry in entries), default=0)
            sizes = [math.prod(map(whole, entry["shape"])) for entry in entries]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise broken from error
    if 8 + length + end != size or not all(0 <= one <= 8 * size for one in sizes):
        raise broken
    return sizes


def _require_layers(path: Path, config: dict, weights: int) -> None:
    """Raise StropError for more layers than weights, which would be built for hours before one is missed."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    told = [part[key] for part in parts for key in LAYERS if type(part.get(key)) is int]
    if max(told, default=0) > weights:
        raise StropError(
            f"{path} has {quoted(max(told))} layers by config.json and {weights} weights: restore the "
            "original files"
        )


def require_memory(checkpoint: Checkpoint, itemsize: float, available: int | None = None) -> None:
    """Raise StropError when the weights cannot fit in free memory.

    `itemsize` is the bytes of a number once loaded; 0 means as stored.
    """
    needed = int(checkpoint.elements * itemsize) or checkpoint.bytes
    free = psutil.virtual_memory().available if available is None else available
    if needed > free:
        gib = 1 << 30
        smaller = " or a smaller dtype (--dtype bf16)" if checkpoint.elements * 2 < needed else ""
        raise StropError(
            f"{checkpoint.path} needs {needed / gib:.1f} GiB for its weights and {free / gib:.1f} GiB of "
            f"memory are free: use a larger machine{smaller}"
        )
