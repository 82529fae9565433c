"""How spiking transformers are trained and measured: AdamW, warm-up, a cosine, checkpoints on the way.

Half of the loss is of the mean over the steps, as the model answers, and half of every step alone (TET, arXiv
2202.11946), so that early steps learn too. Batches are a function of seed and step: a killed run goes on with
the same data where its last checkpoint stood. On a GPU convolutions are bfloat16, membranes float32.
"""

from __future__ import annotations

import json
import math
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from evaluate import share
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from strop.core.intervals import bootstrap
from strop.core.training import restore_run, save_run
from strop.models.spiking_config import SpikingConfig
from strop.models.spiking_vit import SpikingTransformer
from strop.tasks.digits import Camera, Labelled, digits, recordings, right

TIMES = 4
"""Recordings of each held-out image."""
PLAN_SEED, TEST_SEED = 1, 2


@dataclass(frozen=True)
class Plan:
    """How to optimise."""

    passes: int
    """Over the training images; before a camera each shows another recording in each."""
    lr: float
    batch: int = 64
    warmup: float = 0.05
    """First share of the steps, over which the rate rises."""
    weight_decay: float = 0.06
    alone: float = 0.5
    """Share of the loss that is of every step alone."""
    seed: int = 0

    def steps(self, images: int) -> int:
        return self.passes * (images // self.batch)

    def lr_at(self, share: float) -> float:
        """The rate when a share of the steps is done: warm-up, then a cosine to zero."""
        return self.lr * min(1.0, share / self.warmup) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Kind:
    """One model: what it sees, its shape, and how it learns."""

    name: str
    config: SpikingConfig
    plan: Plan
    camera: Camera | None = None

    def held_out(self, part: str) -> Labelled:
        """The images of a part, or `TIMES` recordings of each."""
        if self.camera is None:
            return digits(part)
        return recordings(part, self.camera, TIMES, {"plan": PLAN_SEED, "test": TEST_SEED}[part])


class Run:
    """A training run bound to a folder: it resumes, it checkpoints, it keeps its own log."""

    def __init__(self, kind: Kind, out: Path, device: str, checkpoint_every: int = 100) -> None:
        torch.manual_seed(kind.plan.seed)
        self.kind, self.out, self.device, self.checkpoint_every = kind, out, device, checkpoint_every
        self.model = SpikingTransformer(kind.config).to(device)
        train = digits("train")
        self.images, self.labels = train.images.to(device), train.labels.to(device)
        self.steps = kind.plan.steps(len(train))
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, Any]] = []
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=kind.plan.lr, weight_decay=kind.plan.weight_decay
        )
        self.about = json.loads(json.dumps(asdict(kind)))
        if self.checkpoint.is_file():
            note = restore_run(self.checkpoint, *self._learned(), self.about, self._buffers())
            self.step, self.seconds, self.log = note["step"], note["seconds"], note["log"]

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.safetensors"

    def train(self, until: int | None = None) -> None:
        """Run to step `until` (default: the end), with checkpoints on the way and there."""
        end = min(self.steps, until or self.steps)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.model.train()
        with Progress(*columns, TimeRemainingColumn()) as bar:
            task = bar.add_task("training", total=end, completed=self.step)
            started = time.monotonic()
            while self.step < end:
                loss = self.one_step()
                bar.update(task, completed=self.step)
                if self.step % self.checkpoint_every == 0 or self.step == end:
                    self.log.append({"step": self.step, "loss": round(float(loss), 4)})
                    now = time.monotonic()
                    self.seconds, started = self.seconds + now - started, now
                    self._save()
        self.model.eval()

    def _save(self) -> None:
        note = {"plan": self.about, "step": self.step, "seconds": self.seconds, "log": self.log}
        save_run(self.checkpoint, *self._learned(), note, self._buffers())

    def _learned(self) -> tuple[list[tuple[str, nn.Parameter]], torch.optim.Optimizer]:
        return list(self.model.named_parameters()), self.optimizer

    def _buffers(self) -> dict[str, Tensor]:
        return dict(self.model.named_buffers())

    def one_step(self) -> Tensor:
        """One update of the weights; returns its loss."""
        plan = self.kind.plan
        images, labels = self._batch()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            logits = self.model.logits(images).float()
        each = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))
        loss = plan.alone * each + (1 - plan.alone) * F.cross_entropy(logits.mean(0), labels)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr_at((self.step + 1) / self.steps)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Images or recordings, and labels, of the next step."""
        plan, count = self.kind.plan, len(self.labels)
        number, place = divmod(self.step, count // plan.batch)
        order = torch.randperm(count, generator=_draw(plan.seed, number))
        chosen = order[place * plan.batch : (place + 1) * plan.batch].to(self.device)
        images, labels = self.images[chosen], self.labels[chosen]
        if self.kind.camera is not None:
            images = self.kind.camera.record(images, _draw(plan.seed, self.step))
        return images, labels


def _draw(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def measure(model: SpikingTransformer, kind: Kind) -> dict[str, dict[str, float]]:
    """The share of right answers on images that training never saw, with its 95 % interval.

    The last is of the stem and head alone: what it lacks, the blocks do.
    """
    bare = deepcopy(model)
    bare.blocks = nn.ModuleList()
    plan, test = kind.held_out("plan"), kind.held_out("test")
    judged = {"plan": (model, plan), "test": (model, test), "test, blocks skipped": (bare, test)}
    return {name: _share(right(*of), kind) for name, of in judged.items()}


def _share(answers: Tensor, kind: Kind) -> dict[str, float]:
    """Recordings of one image are not independent: their interval is over images."""
    row = share(answers.tolist())
    if kind.camera is not None:
        by_image = answers.double().view(-1, TIMES).mean(1).numpy()
        estimates = bootstrap(by_image, lambda drawn: drawn.mean(1))
        row = dict(zip(row, (round(x, 4) for x in estimates), strict=True))
    return row | {"count": len(answers)}
