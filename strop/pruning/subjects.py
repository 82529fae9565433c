"""A model to be pruned, with the data that it is judged by, in three parts that share nothing.

`plan` is what planners evaluate on, `test` what nobody looks at before the end, `recover` what batch norms
are measured and weights trained on.
"""

import abc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from strop.core.errors import StropError, reason
from strop.model import Model
from strop.models.spiking_saved import read_tensors
from strop.models.spiking_vit import SpikingTransformer
from strop.models.zoo import zoo_path
from strop.prune import saved
from strop.tasks import next_token
from strop.tasks.data import Data, bundled, bundled_training, read_data
from strop.tasks.digits import Camera, digits, recordings
from strop.weights.text import joined

PARTS = ("plan", "test", "recover")
IMAGES = ("images", "pixel_values")
TRAINED = "training.json"
"""In a folder of a spiking transformer: what it was trained on."""
TIMES = 4
"""Recordings of each held-out image before a camera of events."""
ROWS, LENGTH = {"plan": 32, "test": 32, "recover": 64}, 256
"""Rows of text, and the most tokens of one."""
DOCUMENTS = 400
"""Most documents that bundled text is taken from."""
BATCH = 64


@dataclass(frozen=True)
class Measured:
    """A share of right answers."""

    accuracy: float
    stderr: float
    """Standard error of the mean over independent inputs: images, or rows of text."""
    count: int
    """Independent inputs."""

    @classmethod
    def of(cls, values: Tensor) -> "Measured":
        """The mean of values `[N]` of independent inputs.

        Where all agree none is known exactly: there the error is that of Laplace's rule, 1 / (N + 2).
        """
        count = len(values)
        spread = float(values.std()) if count > 1 else 0.0
        return cls(float(values.mean()), spread / count**0.5 or 1 / (count + 2), count)


@dataclass(frozen=True)
class Part:
    """Inputs `[N, ...]` and labels `[N]`."""

    inputs: Tensor
    labels: Tensor
    times: int = 1
    """Neighbours that show one image."""

    def __len__(self) -> int:
        return len(self.labels)


class Subject(abc.ABC):
    """What is pruned, and what by."""

    model: nn.Module
    data: str
    """Names the data."""
    what: str
    """What the accuracy is of."""
    counts: dict[str, int]
    """Inputs of each part."""

    @abc.abstractmethod
    def right(self, model: nn.Module, part: str) -> Tensor:
        """Which answers are right, as shares of independent inputs `[N]`, float64."""

    @abc.abstractmethod
    def batches(self) -> list[Any]:
        """The part `recover` in batches."""

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """What fine-tuning makes small."""

    @abc.abstractmethod
    def inputs(self, batch: Any) -> Any:
        """The part of a batch that the model reads."""

    def evaluate(self, model: nn.Module) -> float:
        """Accuracy on the planning part."""
        return float(self.right(model, "plan").mean())


class Images(Subject):
    """A classifier of images, spiking or of transformers."""

    what = "images classified right"

    def __init__(self, model: nn.Module, parts: dict[str, Part], data: str) -> None:
        self.model, self.parts, self.data = model, parts, data
        self.counts = {name: len(part) for name, part in parts.items()}

    @torch.no_grad()
    def right(self, model: nn.Module, part: str) -> Tensor:
        held = self.parts[part]
        answers = [self.logits(model, batch).argmax(-1).cpu() for batch in held.inputs.split(4 * BATCH)]
        return (torch.cat(answers) == held.labels).double().view(-1, held.times).mean(1)

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """`[N, classes]`; transformers' classifiers wrap them."""
        weight = next(model.parameters())
        given = model(images.to(weight.device, weight.dtype))
        return getattr(given, "logits", given)

    def batches(self) -> list[Any]:
        held = self.parts["recover"]
        return list(zip(held.inputs.split(BATCH), held.labels.split(BATCH), strict=True))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        images, labels = batch
        logits = self.logits(model, images)
        return F.cross_entropy(logits.float(), labels.to(logits.device))

    def inputs(self, batch: Any) -> Any:
        weight = next(self.model.parameters())
        return batch[0].to(weight.device, weight.dtype)


class Texts(Subject):
    """A causal language model, judged by the next tokens of real text."""

    what = "next tokens predicted right"

    def __init__(self, lm: Model, file: Path | None) -> None:
        self.model = lm.plain
        self.rows, self.data = _rows(lm, file)
        self.counts = {name: len(rows) for name, rows in self.rows.items()}

    def right(self, model: nn.Module, part: str) -> Tensor:
        return next_token.right(model, self.rows[part]).double().mean(1)

    def batches(self) -> list[Any]:
        return list(self.rows["recover"].split(next_token.BATCH))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return next_token.loss(model, batch)

    def inputs(self, batch: Any) -> Any:
        return {"input_ids": batch.to(self.model.device)}


def images(model: nn.Module, source: Path, file: Path | None, seed: int) -> Images:
    """A classifier with a file's images, or those that its folder says it was trained on.

    Raises StropError where neither is there, or a file does not suit.
    """
    if file is not None:
        return Images(model, _split(_read(model, file), seed), file.name)
    if not (isinstance(model, SpikingTransformer) and (source / TRAINED).is_file()):
        raise StropError(
            f"nothing tells what {source} is to be judged by: give --data FILE.safetensors with images and "
            "labels"
        )
    camera = _camera(source / TRAINED)
    if camera is None:
        parts = {name: digits("train" if name == "recover" else name) for name in PARTS}
        return Images(model, {name: Part(d.images, d.labels) for name, d in parts.items()}, "digits")
    made = {}
    for number, name in enumerate(PARTS, 1):
        times = 1 if name == "recover" else TIMES
        seen = recordings("train" if name == "recover" else name, camera, times, number)
        made[name] = Part(seen.images, seen.labels, times)
    return Images(model, made, "digits before a camera of events")


def _folder(source: str) -> Path:
    """The folder of `zoo:NAME` or a path."""
    return zoo_path(source[4:]) if source.startswith("zoo:") else Path(source)


def classifies(told: dict[str, Any]) -> bool:
    """Whether a config is of a classifier of images, not of a language model."""
    names = told.get("architectures")
    return "architecture" in told or (
        isinstance(names, list) and any("ForImageClassification" in str(name) for name in names)
    )


def _camera(file: Path) -> Camera | None:
    """What a spiking transformer saw the digits through; None where they were still."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))["camera"]
        return None if told is None else Camera(**told)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StropError(
            f"{file} does not say what the model looks at ({reason(error)}): restore it, or give --data"
        ) from error


def _read(model: nn.Module, file: Path) -> Part:
    """Images and labels of a file. Raises StropError unless they fit each other and the model."""
    held = read_tensors(file)
    inputs = next((held[name] for name in IMAGES if name in held), None)
    labels = held.get("labels")
    if inputs is None or labels is None:
        raise StropError(f"{file} holds {', '.join(held) or 'nothing'}: images and labels are needed")
    if labels.dim() != 1 or len(labels) != len(inputs) or labels.is_floating_point():
        raise StropError(
            f"{file} has images {list(inputs.shape)} and labels {list(labels.shape)} of {labels.dtype}: one "
            "whole number an image is needed"
        )
    if not inputs.float().isfinite().all():
        raise StropError(f"{file} has images that are not finite: mend them")
    if len(labels) < len(PARTS):
        raise StropError(f"{file} has {len(labels)} images, too few to plan on some and test on others")
    part = Part(inputs.float(), labels.long())
    _require_fit(model, part, file)
    return part


@torch.no_grad()
def _require_fit(model: nn.Module, part: Part, file: Path) -> None:
    """Raise StropError unless the model reads such images and knows such labels."""
    subject = Images(model, {"plan": part}, file.name)
    try:
        classes = subject.logits(model, part.inputs[:2]).shape[-1]
    except StropError as error:
        raise StropError(f"{file}: {error}") from error
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise StropError(f"the model does not read the images of {file}: {reason(error)}") from error
    low, high = int(part.labels.min()), int(part.labels.max())
    if low < 0 or high >= classes:
        raise StropError(f"{file} has labels from {low} to {high}, and the model knows 0 to {classes - 1}")


def _split(part: Part, seed: int) -> dict[str, Part]:
    """Three equal parts by lot."""
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
    thirds = order.tensor_split(len(PARTS))
    return {n: Part(part.inputs[at], part.labels[at]) for n, at in zip(PARTS, thirds, strict=True)}


def _rows(lm: Model, file: Path | None) -> tuple[dict[str, Tensor], str]:
    """Rows of token ids `[N, L]` for each part, and what they are of.

    Each part is a stretch of its own. Without a file, text that models here were not trained on tells what a
    cut costs, and text that they were trained on is what they recover by.
    """
    length = min(LENGTH, lm.context_limit)
    if file is None:
        name = str(lm.recipe.model)
        held, count = bundled(name, DOCUMENTS), ROWS["plan"] + ROWS["test"]
        plan, test = _cut(lm, held, count, length).tensor_split(2)
        recover = _cut(lm, bundled_training(name), ROWS["recover"], length)
        return {"plan": plan, "test": test, "recover": recover}, held.name
    data = read_data(file)
    every = _cut(lm, data, sum(ROWS.values()), length)
    if len(every) < len(PARTS):
        raise StropError(
            f"{file} holds {len(every)} rows of {length} tokens, too few to plan on some and test on others: "
            "give more text"
        )
    shares = [len(every) * ROWS[name] // sum(ROWS.values()) or 1 for name in PARTS[:2]]
    return dict(zip(PARTS, every.split([*shares, len(every) - sum(shares)]), strict=True)), data.name


def _cut(lm: Model, data: Data, rows: int, length: int) -> Tensor:
    """The first `rows` rows of a text, or as many as it has."""
    ids = torch.tensor(joined(lm.tokenizer, data, rows * length), dtype=torch.long)
    whole = min(rows, len(ids) // length)
    return ids[: whole * length].view(whole, length)


def opened(source: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a source, and its config. Raises StropError where there is none."""
    folder = _folder(source)
    return folder, saved.read_config(folder)
