"""A drafter by its name: `ngram`, `zoo:NAME`, a drafter's folder, or the folder of a small language model."""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from strop.core.checkpoint import inspect
from strop.core.errors import StropError
from strop.decode.checkpoint import read_drafter
from strop.decode.drafter import Drafter
from strop.decode.ngram import NGram
from strop.decode.small_lm import SmallLM
from strop.models.zoo import zoo_path


def load_drafter(name: str | Path, target: PreTrainedModel) -> Drafter:
    """The drafter called `name`, bound to its target.

    Raises StropError when it is missing or damaged, or was made for another model or tokenizer.
    """
    if name == "ngram":
        return NGram()
    folder = zoo_path(str(name)[4:]) if str(name).startswith("zoo:") else Path(name)
    if not folder.is_dir():
        raise StropError(
            f"no drafter at {folder}: give ngram, zoo:NAME, or the folder of a drafter or a model"
        )
    if _is_block_drafter(folder):
        return read_drafter(folder, target)
    inspect(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=target.dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # transformers and safetensors raise many kinds for a broken folder
        reason = " ".join(str(error).split())[:200]
        raise StropError(f"{folder} holds neither a drafter nor a language model ({reason})") from error
    return SmallLM(model.to(target.device).eval(), target)


def _is_block_drafter(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StropError(f"{folder} has no readable config.json: is the drafter complete?") from error
    return isinstance(config, dict) and "dflash_config" in config
