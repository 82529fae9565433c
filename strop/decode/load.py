"""A drafter by its name: `ngram`, `zoo:NAME`, a drafter's folder, or the folder of a small language model."""

import json
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from strop.core.causal import load_causal, require_causal
from strop.core.checkpoint import inspect, require_memory
from strop.core.errors import StropError
from strop.decode.checkpoint import fingerprint, read_drafter
from strop.decode.drafter import Drafter
from strop.decode.ngram import NGram
from strop.decode.small_lm import SmallLM
from strop.models.zoo import zoo_names, zoo_path

NGRAM = "ngram"


def load_drafter(name: str | Path, target: PreTrainedModel) -> Drafter:
    """The drafter called `name`, bound to its target.

    Raises StropError when it is missing or damaged, or was made for another model or tokenizer.
    """
    if name == NGRAM:
        return NGram()
    folder = _folder(name)
    if not folder.is_dir():
        raise StropError(
            f"no drafter at {folder}: give ngram, zoo:NAME, or the folder of a drafter or a model"
        )
    if "dflash_config" in _config(folder):
        return read_drafter(folder, target)
    checkpoint = inspect(folder)
    require_causal(checkpoint)
    require_memory(checkpoint, target.dtype.itemsize)
    _require_tokenizer(folder, Path(target.name_or_path))
    return SmallLM(load_causal(checkpoint, target.dtype, target.device), target)


def drafters_for(target: PreTrainedModel) -> list[str]:
    """The bundled drafters that were trained for `target`, as `zoo:NAME`."""
    try:
        folders = {name: zoo_path(name) for name in zoo_names()}
        configs = {name: _config(at) for name, at in folders.items() if (at / "config.json").is_file()}
    except StropError:
        return []
    wanted = fingerprint(target)
    return [f"zoo:{name}" for name, config in configs.items() if config.get("target_fingerprint") == wanted]


def drafter_digest(name: str) -> str | None:
    """16 hex digits that name what a drafter's folder holds; None where there is no folder."""
    if name == NGRAM:
        return None
    try:
        files = sorted(_folder(name).glob("*.safetensors"))
        hasher = blake2b((_folder(name) / "config.json").read_bytes(), digest_size=8)
        for path in files:
            with path.open("rb") as file:
                hasher.update(file_digest(file, blake2b).digest())
    except (OSError, StropError):
        return None
    return hasher.hexdigest()


def _require_tokenizer(folder: Path, target: Path) -> None:
    """Raise StropError where both folders tell their vocabulary and these differ."""
    files = [place / "tokenizer.json" for place in (folder, target)]
    if not all(file.is_file() for file in files):
        return
    try:
        own, wanted = (json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"] for file in files)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StropError(f"cannot read the vocabulary in {folder}: restore its tokenizer.json") from error
    if own != wanted:
        raise StropError(
            f"{folder} has another tokenizer than {target}: use a model with the target's tokenizer"
        )


def _folder(name: str | Path) -> Path:
    return zoo_path(str(name)[4:]) if str(name).startswith("zoo:") else Path(name)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StropError(f"{folder} has no readable config.json: is the drafter complete?") from error
    return config if isinstance(config, dict) else {}
