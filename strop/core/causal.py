"""A causal language model from a folder: what transformers would load wrong, or in part, is refused."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from strop.core.checkpoint import Checkpoint
from strop.core.errors import StropError, quoted, reason
from strop.core.narrow import class_of

FROM_FOLDER: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""No network, and no code that a checkpoint brings along."""
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_causal(
    checkpoint: Checkpoint,
    dtype: str | torch.dtype,
    device: str | torch.device,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """The model, ready to be run; `config` replaces the one in the folder.

    Raises StropError unless it is whole and finite.
    """
    model = load_whole(AutoModelForCausalLM, checkpoint.path, checkpoint.config, dtype, config)
    _require_tokens(model, checkpoint.path)
    moved: Any = model
    return moved.to(device)


def load_whole(
    auto: Any,
    path: Path,
    told: Mapping[str, Any],
    dtype: str | torch.dtype,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """The model of a folder whose config.json is `told`, of the class that `auto` of transformers chooses.

    Raises StropError unless it is whole and finite.
    """
    other = {} if config is None else {"config": config}
    try:
        found: Any = class_of(auto, path, told, config, **FROM_FOLDER).from_pretrained(
            path,
            **FROM_FOLDER,
            **other,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except StropError:
        raise
    except Exception as error:  # safetensors and transformers raise many kinds for a broken file
        raise not_loaded("model", path, error) from error
    model, loaded = found
    _require_whole(model, loaded, path)
    _require_finite(model, path)
    return model.eval()


def not_loaded(part: str, path: Path, error: Exception) -> StropError:
    """What to raise where transformers cannot load a part of a folder."""
    said = reason(error)
    return StropError(f"transformers cannot load the {part} in {path} ({said}): restore the original files")


def require_causal(checkpoint: Checkpoint) -> None:
    """Raise StropError unless the config is of a causal language model."""
    kind = checkpoint.config["model_type"]
    told = checkpoint.config.get("architectures")
    classes = [str(name) for name in told] if isinstance(told, list) else []
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, "")
    if not known or (classes and not any(name in known or "ForCausalLM" in name for name in classes)):
        raise StropError(
            f"{checkpoint.path} holds a model of class {', '.join(classes) or kind}, not a causal language "
            "model that transformers runs: give a decoder such as Qwen3, Llama, Mistral, Gemma or GPT-2"
        )


def _require_whole(model: PreTrainedModel, loaded: dict[str, Any], path: Path) -> None:
    """transformers draws weights that are missing or misshapen at random, and says so in a log."""
    for name, stored, wanted in loaded["mismatched_keys"]:
        raise StropError(
            f"{path}: weight {name} is {tuple(stored)} in the file and {tuple(wanted)} by config.json: "
            "restore the original files"
        )
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise StropError(
            f"{path} lacks {len(missing)} of the weights of a {type(model).__name__}, first {missing[0]}: "
            "is it whole, and a causal language model?"
        )


def _require_tokens(model: PreTrainedModel, path: Path) -> None:
    """transformers takes anything for the ids that begin, end and fill texts, until it writes one."""
    for name in SPECIAL:
        told = getattr(model.generation_config, name, None)
        for token in told if isinstance(told, list) else [told]:
            if token is not None and not (type(token) is int and abs(token) < 1 << 63):
                raise StropError(f"{path}: {name} is {quoted(told)}, no token: restore the original files")


def _require_finite(model: PreTrainedModel, path: Path) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or math.isfinite(tensor.detach().float().sum().item()):
            continue
        if not tensor.isfinite().all():
            raise StropError(f"{path}: weight {name} holds NaN or infinity: download it again")
