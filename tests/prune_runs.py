"""What tests of `strop prune` share: a model whose own answers are right, and a run of its own data."""

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from test_cli import TEXT, said, save_tiny, strop_

from strop.models import spiking_saved
from strop.models.spiking_config import SpikingConfig
from strop.models.spiking_vit import SpikingTransformer
from strop.prune import reestimate


def save_spiking(folder: Path, seed: int = 0, **changes: Any) -> SpikingTransformer:
    """A spiking transformer of seeded noise that fires, and says more than one thing."""
    torch.manual_seed(seed)
    shape = {"classes": 4, "heads": 4, "steps": 2, "channels": 1, "pools": "001"} | changes
    model = SpikingTransformer(SpikingConfig.sdt(1, 16, **shape))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias)
            torch.nn.init.constant_(module.weight, 2.0)
    model = reestimate(model.eval(), [drawn(90, model.config.channels)])
    torch.nn.init.zeros_(model.head.bias)
    folder.mkdir()
    spiking_saved.save(model, folder)
    return model


def drawn(count: int, channels: int = 1) -> torch.Tensor:
    """Noise that differs in brightness from image to image."""
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, channels, 8, 8, generator=draw)
    return pixels + 2 * torch.randn(count, 1, 1, 1, generator=draw)


def save_images(file: Path, model: SpikingTransformer, count: int = 90) -> Path:
    """Images that the model is right on, by what it says."""
    pictures = drawn(count)
    with torch.no_grad():
        labels = model(pictures).argmax(-1)
    save_file({"images": pictures, "labels": labels}, file)
    return file


def laid(at: Path) -> Path:
    """A folder with a spiking model and its images, and a language model with text."""
    save_images(at / "data.safetensors", save_spiking(at / "model"))
    (at / "text.txt").write_text(TEXT * 3)
    save_tiny(at / "lm")
    return at


def prune(place: Path, out: Path, *words: object, code: int = 0, verb: Any = strop_) -> Any:
    given = ["--data", place / "data.safetensors", "-o", out]
    return verb("prune", place / "model", *given, *words, code=code)


def told_by(result: Any) -> str:
    return " ".join(result.output.split())


def planned(place: Path, out: Path) -> tuple[Path, dict[str, Any]]:
    """A whole run, with recovery: the folder, and what it says."""
    return out, prune(place, out, "--tolerance", "40%", "--recover", "bn,finetune", verb=said)


def edited(plan: Path, at: Path, **kept: Any) -> Path:
    data = yaml.safe_load(plan.read_text())
    for row in data["rows"]:
        row["kept"] = kept.get(row["name"].replace(".", "_"), row["kept"])
    at.write_text(yaml.safe_dump(data))
    return at
