"""What claims about pruning are measured on: spiking transformers that read digits, and halves of new images.

The 600 images that training never saw are parted by lot, again and again: `evaluate` asks one half when a
plan is made, the other judges the plan. A model answers every image once, whatever the halves, and what its
first stages give is remembered, since most plans leave them alone.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from strop.claims.base import Progress
from strop.core.errors import StropError
from strop.core.hooks import shared
from strop.core.sampling import keyed_generator
from strop.models.spiking_saved import from_folder
from strop.models.spiking_vit import SpikingTransformer
from strop.models.zoo import zoo_path
from strop.prune.plan import fingerprint
from strop.prune.search import Evaluate
from strop.prune.trace import trace
from strop.prune.units import Units
from strop.tasks.digits import EVENTS, Labelled, digits, recordings, right

BATCH = 64
"""Of training."""
REMEMBERED = 16
"""Outputs of stages that are kept, the last ones used: 15 MB each."""
PARTS = {"plan": 1, "test": 2}
"""Parts of the digits that training never saw, with the seeds of their recordings."""
LAYING = 1
"""Measurements that `lay` announces."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiments are."""

    name: str
    device: str = "cpu"
    events: tuple[str, ...] = ("svit-events", "svit-events-1")
    """Bundled models that read recordings, which differ in the seed of their training."""
    digits: tuple[str, ...] = ("svit-digits", "svit-digits-1")
    """The same for still images."""
    splits: int = 5
    """Halvings of the images."""
    times: int = 2
    """Recordings of an image."""
    draws: int = 3
    """Lots of channels, and of orders."""
    statistics: int = 400
    """Training recordings that batch norms are measured on anew."""
    passes: int = 3
    """Over the training images in fine-tuning: a twentieth of training."""


SCALES = {"cpu": Scale(name="cpu"), "gpu": Scale(name="gpu", device="cuda", splits=20, times=4, draws=10)}


class Split(NamedTuple):
    """Two halves of the images: to plan by, and for the last word."""

    plan: Tensor
    test: Tensor


class Answers:
    """Which answers of a model are right, asked once of models that are the same number by number."""

    def __init__(self, data: Labelled, times: int = 1) -> None:
        self.data, self.times = data, times
        self._known: dict[str, Tensor] = {}
        self._given: OrderedDict[str, list[Tensor]] = OrderedDict()

    def __call__(self, model: SpikingTransformer) -> Tensor:
        """The share of an image's recordings that are answered rightly, `[images]`."""
        key = fingerprint(model)
        if key not in self._known:
            self._known[key] = self._right(model).double().view(-1, self.times).mean(1)
        return self._known[key]

    def on(self, images: Tensor) -> Evaluate:
        """Accuracy on some of the images."""
        return lambda model: float(self(model)[images].mean())

    def _right(self, model: SpikingTransformer) -> Tensor:
        """As `right` has it, from the last stage on whose output is known."""
        stages = [model.stem, *model.blocks]
        names = [*accumulate(fingerprint(stage) for stage in stages)]
        known = max((count for count, name in enumerate(names, 1) if name in self._given), default=0)
        rest = shared(model)
        if known:
            self._given.move_to_end(names[known - 1])
            rest.stem = _Given(self._given[names[known - 1]])
            rest.blocks = rest.blocks[known - 1 :]
        fresh = [rest.stem, *rest.blocks][bool(known) :]
        for name, stage in zip(names[known:-1], fresh, strict=False):
            given = self._given[name] = []
            stage.register_forward_hook(lambda _stage, _read, output, given=given: given.append(output))
        answers = right(rest, self.data)
        while len(self._given) > REMEMBERED:
            self._given.popitem(last=False)
        return answers


class _Given(nn.Module):
    """Stands for the stages whose outputs are known, batch by batch."""

    def __init__(self, outputs: list[Tensor]) -> None:
        super().__init__()
        self.left: Iterator[Tensor] = iter(outputs)

    def forward(self, frames: Tensor) -> Tensor:
        return next(self.left)


@dataclass(frozen=True)
class Subject:
    """A trained model, what of it can be cut, and what it knows."""

    name: str
    model: SpikingTransformer
    units: Units
    answers: Answers

    def judged(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Accuracy on both halves."""
        found = self.answers(model)
        return {"val": float(found[split.plan].mean()), "test": float(found[split.test].mean())}

    def saved(self, model: nn.Module) -> float:
        """The share of the dense model's parameters that another lacks, counted in its tensors."""
        sizes = (sum(tensor.numel() for tensor in one.parameters()) for one in (model, self.model))
        return 1 - next(sizes) / next(sizes)


@dataclass(frozen=True)
class Bed:
    """The models by name, halves of the images that they share, and what they may learn from again."""

    subjects: dict[str, Subject]
    splits: tuple[Split, ...]
    training: Labelled
    """Recordings of the training images in random order."""

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Recordings with their labels, to learn from."""
        both = self.training.images.split(BATCH), self.training.labels.split(BATCH)
        return [*zip(*both, strict=True)]


def lay(scale: Scale, progress: Progress) -> Bed:
    """Load the bundled models, record the images and part them."""
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise StropError("no CUDA device is visible: use --scale cpu, or see `strop doctor`")
    progress("recording the digits")
    models = {name: from_folder(zoo_path(name)).to(scale.device) for name in (*scale.events, *scale.digits)}
    moving = joined(*(recordings(part, EVENTS, scale.times, seed) for part, seed in PARTS.items()))
    still = joined(*(digits(part) for part in PARTS))
    answers = {name: Answers(moving, scale.times) for name in scale.events}
    answers |= {name: Answers(still) for name in scale.digits}
    subjects = {name: Subject(name, one, trace(one), answers[name]) for name, one in models.items()}
    training = recordings("train", EVENTS, scale.passes, 0)
    order = torch.randperm(len(training), generator=keyed_generator("recordings to learn from"))
    shuffled = Labelled(training.images[order].to(scale.device), training.labels[order].to(scale.device))
    return Bed(subjects, halves(len(still), scale.splits), shuffled)


def joined(*parts: Labelled) -> Labelled:
    """The images of all parts."""
    return Labelled(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


def halves(images: int, splits: int) -> tuple[Split, ...]:
    """Numbers of images, parted by lot."""
    orders = (
        torch.randperm(images, generator=keyed_generator(seed, "planning images")) for seed in range(splits)
    )
    return tuple(Split(order[: images // 2], order[images // 2 :]) for order in orders)
