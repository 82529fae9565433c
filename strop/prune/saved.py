"""Pruned models on disk: a folder with config.json, model.safetensors and prune.yaml.

The config is the dense model's, and tells beside it which tensors are smaller (`strop.core.narrow`), so that
a folder needs nothing else to be loaded. Spiking transformers, and causal language models and image
classifiers of transformers, are read; weights are safetensors, whole and finite, or a sentence says why not.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto import modeling_auto

from strop.core.causal import load_whole
from strop.core.errors import StropError, quoted, reason
from strop.core.files import write_json
from strop.core.narrow import KEY, narrow, record
from strop.models import spiking_saved
from strop.models.spiking_config import ARCHITECTURE, SpikingConfig
from strop.models.spiking_vit import SpikingTransformer
from strop.prune.plan import PrunePlan

CONFIG, PLAN = "config.json", "prune.yaml"


def load(path: str | Path, dtype: str | torch.dtype = "auto") -> nn.Module:
    """The model of a folder, pruned or dense, ready to be run.

    Raises StropError unless it is whole, finite, and a spiking transformer, a causal language model or an
    image classifier.
    """
    path = Path(path)
    told = read_config(path)
    if told.get("architecture") == ARCHITECTURE:
        return _spiking(path, told)
    return load_whole(_auto(path, told), path, told, dtype)


def save(thin: nn.Module, dense: nn.Module, plan: PrunePlan, path: Path) -> None:
    """Write `thin`, cut out of `dense` by `plan`, into the folder `path`, the config last.

    Raises StropError where there is no form for such a model, or no room for it.
    """
    before = None
    if isinstance(thin, SpikingTransformer):
        spiking_saved.save(thin, path)
        config = thin.config.to_json()
        with torch.device("meta"):
            dense = SpikingTransformer(thin.config)
    elif isinstance(thin, PreTrainedModel):
        try:
            thin.save_pretrained(path)
        except (OSError, SafetensorError) as error:
            raise StropError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
        config, before = read_config(path), getattr(thin.config, KEY, None)
    else:
        raise StropError(f"a {type(thin).__name__} has no form on disk: save its state_dict and the plan")
    (path / CONFIG).unlink()
    plan.save(path / PLAN)
    write_json(path / CONFIG, config | {KEY: record(dense, thin, before)})


def read_config(path: Path) -> dict[str, Any]:
    """What config.json says. Raises StropError where it is missing or no JSON object."""
    if not path.is_dir():
        raise StropError(f"no model folder at {path}: give a checkpoint folder or zoo:NAME")
    try:
        told = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StropError(
            f"{path} has no readable {CONFIG} ({reason(error)}): restore the original files"
        ) from error
    if not isinstance(told, dict):
        raise StropError(f"{path / CONFIG} holds {quoted(told)}, no config: restore the original file")
    return told


def _spiking(path: Path, told: dict[str, Any]) -> SpikingTransformer:
    pruned = told.pop(KEY, None)
    try:
        config = SpikingConfig.from_json(told)
    except StropError as error:
        raise StropError(f"{path / CONFIG}: {error}") from error
    model = spiking_saved.build(config)
    if pruned is not None:
        narrow(model, pruned)
    spiking_saved.load_weights(model, path)
    return model.eval()


def _auto(path: Path, told: dict[str, Any]) -> Any:
    """The class of transformers' that chooses the model's class."""
    known = {
        AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        AutoModelForImageClassification: modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    kind, classes = str(told.get("model_type")), told.get("architectures")
    for auto, names in known.items():
        fits = names.get(kind, ())
        if fits and (not classes or any(one in fits for one in classes)):
            return auto
    raise StropError(
        f"{path} holds a {quoted(classes or kind)}: give a spiking transformer, a causal language model or "
        "an image classifier of transformers"
    )
