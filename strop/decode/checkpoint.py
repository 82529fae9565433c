"""Drafters on disk: a safetensors folder whose config.json has the published DFlash form.

Besides that form's `block_size` and `dflash_config`, a folder written here names its target by a fingerprint,
and has `treeflash_config` where there is an approximator. Beside another target the drafter is refused.
"""

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from strop.core.errors import StropError, quoted, reason
from strop.core.files import atomic
from strop.decode.dflash import DFlashDrafter, DFlashNet, default_taps
from strop.decode.treeflash import Approximator, TreeFlashDrafter

ROWS = 16
"""M of TreeFlash where a config does not say."""
SAMPLED = 4096
"""Numbers of the embedding that a fingerprint reads."""
APPROXIMATOR = "approximator."


def fingerprint(target: PreTrainedModel) -> str:
    """16 hex digits that name a target by its embedding, whatever its dtype and however layers are coded."""
    weight = target.get_input_embeddings().weight.detach()
    spread = torch.linspace(0, weight.numel() - 1, SAMPLED, dtype=torch.float64).long().to(weight.device)
    numbers = weight.flatten()[spread].bfloat16().view(torch.int16).cpu().numpy().tobytes()
    return blake2b(repr(tuple(weight.shape)).encode() + numbers, digest_size=8).hexdigest()


def new_config(
    target: PreTrainedModel,
    layers: int,
    block_size: int,
    mask_token_id: int,
    taps: list[int] | None = None,
    intermediate_size: int | None = None,
) -> Qwen3Config:
    """The config of a drafter of `target`'s width and head shape; taps are spread evenly by default."""
    of = target.config.get_text_config(decoder=True)
    heads = of.num_attention_heads
    return Qwen3Config(
        architectures=["DFlashDraftModel"],
        vocab_size=of.vocab_size,
        hidden_size=of.hidden_size,
        intermediate_size=intermediate_size or getattr(of, "intermediate_size", None) or 4 * of.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(of, "num_key_value_heads", None) or heads,
        head_dim=getattr(of, "head_dim", None) or of.hidden_size // heads,
        max_position_embeddings=of.max_position_embeddings,
        rope_parameters=getattr(of, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 1e4},
        block_size=block_size,
        num_target_layers=of.num_hidden_layers,
        dflash_config={
            "mask_token_id": mask_token_id,
            "target_layer_ids": taps or default_taps(of.num_hidden_layers, layers),
        },
        target_fingerprint=fingerprint(target),
    )


def save_drafter(
    folder: Path, net: DFlashNet, approximator: Approximator | None = None, rows: int = ROWS
) -> None:
    """Write a drafter's folder in bfloat16, the config last, so that a folder with one is whole.

    An older config goes first. Raises StropError when the disk is full.
    """
    tensors = dict(net.state_dict())
    config = net.config.to_diff_dict()
    if approximator is not None:
        tensors |= {APPROXIMATOR + name: tensor for name, tensor in approximator.state_dict().items()}
        config |= {"architectures": ["TreeFlashDraftModel"], "treeflash_config": {"rows": rows}}
    stored = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()
    }
    (folder / "config.json").unlink(missing_ok=True)
    with atomic(folder / "model.safetensors") as temporary:
        save_file(stored, temporary, metadata={"format": "pt"})
    with atomic(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_drafter(folder: Path, target: PreTrainedModel) -> DFlashDrafter:
    """Load a DFlash or TreeFlash drafter and bind it to its target, in the target's dtype and on its device.

    Raises StropError when the folder is incomplete or damaged, or was made for another target.
    """
    tensors = _tensors(folder)
    config = _config(folder, target, len(tensors))
    try:
        return _bound(config, tensors, folder, target)
    except StropError:
        raise
    except Exception as error:  # torch and transformers raise many kinds for sizes that cannot be
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise StropError(
            f"{folder}: config.json describes no drafter ({reason}): restore the original files"
        ) from error


def _bound(
    config: Qwen3Config, tensors: Mapping[str, Tensor], folder: Path, target: PreTrainedModel
) -> DFlashDrafter:
    correction = {
        name.removeprefix(APPROXIMATOR): tensor
        for name, tensor in tensors.items()
        if name.startswith(APPROXIMATOR)
    }
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(APPROXIMATOR)}
    net = _filled(DFlashNet(config), rest, folder).to(target.device, target.dtype)
    net.rotary = Qwen3RotaryEmbedding(config).to(target.device)  # frequencies stay in float32
    if not correction:
        return DFlashDrafter(net, target)
    approximator = _filled(Approximator(config), correction, folder).to(target.device, target.dtype)
    rows = getattr(config, "treeflash_config", {}).get("rows", ROWS)
    if type(rows) is not int or rows < 1:
        raise ValueError(f"rows of treeflash_config must be a number from 1 on, got {quoted(rows)}")
    return TreeFlashDrafter(net, approximator, target, rows)


def _filled(module: Any, tensors: Mapping[str, Tensor], folder: Path) -> Any:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise StropError(
            f"{folder}: the weights do not fit sizes, layers and target_layer_ids of config.json "
            f"({reason(error)}): restore the original files"
        ) from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise StropError(f"{folder}: weight {name} holds NaN or infinity: download it again")
    return module


def _tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise StropError(f"{folder} holds no model.safetensors: is the drafter complete?")
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise StropError(
            f"{folder} holds a damaged safetensors file ({reason(error)}): download it again"
        ) from error


def _config(folder: Path, target: PreTrainedModel, weights: int) -> Qwen3Config:
    """The drafter's config, after checking that it is one, of so many weights, and belongs to `target`."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        own = raw["dflash_config"]
        raw["block_size"] = int(raw.get("block_size") or own["block_size"])
        if not 0 < (layers := raw.get("num_hidden_layers", 1)) <= weights:
            raise ValueError(f"{layers} layers of {weights} weights")
        config = Qwen3Config(
            **{key: value for key, value in raw.items() if key not in ("auto_map", "model_type")}
        )
        count, layers = config.num_target_layers, config.num_hidden_layers
        taps = own.setdefault("target_layer_ids", default_taps(count, layers))
        config.dflash_config = {
            "mask_token_id": int(own["mask_token_id"]),
            "target_layer_ids": list(map(int, taps)),
        }
    except OSError as error:
        raise StropError(f"cannot read {folder / 'config.json'}: {error.strerror}") from error
    except Exception as error:  # transformers' config classes raise many kinds for a broken file
        raise StropError(
            f"{folder / 'config.json'} is not a DFlash drafter's ({type(error).__name__}: {reason(error)}): "
            "it needs block_size, num_target_layers and dflash_config with mask_token_id"
        ) from error
    _require_fits(config, target, folder)
    return config


def _require_fits(config: Qwen3Config, target: PreTrainedModel, folder: Path) -> None:
    of = target.config.get_text_config(decoder=True)
    embedding = target.get_input_embeddings().weight
    told = {
        "vocabulary": config.vocab_size,
        "hidden size": config.hidden_size,
        "layers": config.num_target_layers,
    }
    have = {"vocabulary": of.vocab_size, "hidden size": embedding.shape[1], "layers": of.num_hidden_layers}
    for what, wanted in told.items():
        if wanted != have[what]:
            raise StropError(
                f"{folder} drafts for a model of {what} {wanted} and this one has {have[what]}: use the "
                "drafter made for this model"
            )
    named = getattr(config, "target_fingerprint", None)
    if named is not None and named != fingerprint(target):
        raise StropError(
            f"{folder} was trained for another model of this shape: use the drafter made for this one"
        )
    limit = of.max_position_embeddings
    if not 2 <= config.block_size <= limit:
        raise StropError(
            f"{folder} drafts blocks of {config.block_size}, outside 2 to the model's context of {limit}"
        )
    taps, mask = config.dflash_config["target_layer_ids"], config.dflash_config["mask_token_id"]
    if not (taps and all(0 <= tap < of.num_hidden_layers for tap in taps) and 0 <= mask < len(embedding)):
        raise StropError(
            f"{folder} names layers {taps} and mask token {mask}, which this model does not have"
        )
    if "sliding_attention" in (config.layer_types or ()):
        raise StropError(
            f"{folder} has sliding-window layers, which the drafter here does not: use a full one"
        )
