"""Spiking transformers on disk: a folder with `config.json` and `model.safetensors`.

`from_folder` is `build(read_config(path))` and `load_weights(module, path)`, so that a module of other
widths, as pruning leaves it, can take the built one's place.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from strop.core.errors import StropError, quoted, reason
from strop.core.files import atomic, write_json
from strop.models.spiking_config import SpikingConfig
from strop.models.spiking_vit import SpikingTransformer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MOST = 1 << 31
"""Numbers of the largest model that is built from a config."""


def from_folder(path: Path) -> SpikingTransformer:
    """The model of a folder, ready to be run. Raises StropError unless it is whole, and fits its config."""
    model = build(read_config(path))
    load_weights(model, path)
    return model.eval()


def save(model: SpikingTransformer, path: Path) -> None:
    """Write a folder, the config last, so that a folder with one is whole. An older config goes first."""
    (path / CONFIG).unlink(missing_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _stored(model).items()}
    with atomic(path / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(path / CONFIG, model.config.to_json())


def read_config(path: Path) -> SpikingConfig:
    """What a folder's config says. Raises StropError where it is missing, damaged, or of something else."""
    file = path / CONFIG
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StropError(
            f"{path} has no readable {CONFIG} ({reason(error)}): give the folder of a spiking transformer"
        ) from error
    try:
        return SpikingConfig.from_json(told)
    except StropError as error:
        raise StropError(f"{file}: {error}") from error


def build(config: SpikingConfig) -> SpikingTransformer:
    """A module with weights drawn at random. Raises StropError for one too large to be meant."""
    with torch.device("meta"):
        numbers = sum(tensor.numel() for tensor in _stored(SpikingTransformer(config)).values())
    if numbers > MOST:
        raise StropError(f"the config describes {numbers:,} numbers, more than {MOST:,}: correct its widths")
    return SpikingTransformer(config)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module from a folder's weights, in the module's dtype and place; raises StropError as `fill`."""
    fill(module, read_tensors(path / WEIGHTS), path / WEIGHTS)


def fill(module: nn.Module, found: Mapping[str, Tensor], file: Path) -> None:
    """Copy tensors of a file into a module.

    Raises StropError where any is missing, left over, of another shape, or not of finite numbers.
    """
    wanted = _stored(module)
    for names, what in (
        (wanted.keys() - found, "lacks"),
        (found.keys() - wanted, "holds, beyond its config,"),
    ):
        if names:
            raise StropError(
                f"{file} {what} {len(names)} tensors, first {quoted(min(names))}: restore the original files"
            )
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise StropError(
                f"{file}: {name} is {list(tensor.shape)}, {list(wanted[name].shape)} by the config: restore "
                "the original files"
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise StropError(f"{file}: {name} holds what is no finite number: restore the original file")
    with torch.no_grad():
        for name, tensor in found.items():
            wanted[name].copy_(tensor)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises StropError for a missing or broken one, and for pickles."""
    if file.suffix in PICKLES:
        raise StropError(_pickled(file))
    if not file.is_file():
        other = next((p for p in sorted(file.parent.glob("*")) if p.suffix in PICKLES), None)
        raise StropError(_pickled(other) if other else f"{file} is missing: is the folder complete?")
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise StropError(
            f"{file} is truncated or not a safetensors file ({reason(error)}): restore the original file"
        ) from error


def _pickled(file: Path) -> str:
    return (
        f"{file} is pickled, which can run code when loaded: where you trust it, load it with torch.load and "
        "write its tensors with safetensors.torch.save_file"
    )


def _stored(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, but for the counts of batches, which nothing here reads."""
    return {n: t for n, t in module.state_dict().items() if not n.endswith("num_batches_tracked")}
