"""Fine-tunes a causal model to read documents that do not see each other (Block-Attention, arXiv 2409.15355).

A document's keys and values can be moved to another place exactly, but an ordinary model was trained to read
each document in the light of those before it. Here the loss of answers is lowered while every document sees
itself alone (`document_rows.alone`); under `in_sequence` the same recipe gives the ordinary model to compare
with.

Left out: full attention in a share of the rows, by which Block-Attention keeps both ways of reading.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from strop.core.errors import StropError
from strop.core.training import Report, restore_run, save_run
from strop.kv.document_rows import IGNORED, Asked, Packed, Sees, alone, pack

PROBE = 6
"""Tokens of each text on which a model is tried."""
ROUNDING = 2e-2
"""Share of the largest logit by which two ways to the same logits may differ; bfloat16 takes most of it."""

Rows = Callable[[int], Sequence[Asked]]
"""The rows of a step counted from 0; a run that goes on after a kill asks for the same ones again."""


@dataclass(frozen=True)
class Plan:
    """How to optimise; how many rows a step has belongs to the rows."""

    steps: int
    lr: float = 1e-5
    warmup: int = 100
    decay: float = 0.3
    """Last share of the steps, over which the learning rate falls linearly to zero."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0 or not 0 <= self.decay <= 1 or not self.lr > 0:
            raise StropError("training takes at least one step, a rate above 0 and a decay of 0 to 1")

    def lr_at(self, step: int) -> float:
        """Warm-up, plateau, decay: the learning rate of a step counted from 0."""
        rising, left = (step + 1) / max(self.warmup, 1), (self.steps - step) / max(self.decay * self.steps, 1)
        return self.lr * min(1.0, rising, left)


class DocumentTrainer:
    """One training run in a folder: AdamW with a checkpoint from which a killed run goes on.

    Trains what requires a gradient, in place, by cross-entropy of the answers. Raises StropError for a model
    whose documents would not encode the same everywhere.
    """

    def __init__(self, model: PreTrainedModel, rows: Rows, plan: Plan, out: Path, sees: Sees = alone) -> None:
        require_placeable(model.eval())
        self.model, self.rows, self.plan, self.out, self.sees = model, rows, plan, out, sees
        self.step, self.seconds, self.tokens, self.log = 0, 0.0, 0, list[dict[str, Any]]()
        self.trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not self.trained:
            raise StropError(f"{type(model).__name__} has no weights that require a gradient: unfreeze some")
        matrices = [p for _, p in self.trained if p.dim() > 1]
        others = [p for _, p in self.trained if p.dim() <= 1]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay
        )

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.safetensors"

    def run(self, report: Report, every: int = 200) -> None:
        """Train to the plan's end; `report` hears how it goes, and a checkpoint is kept `every` steps."""
        if self.checkpoint.exists():
            self.restore()
        self.model.train()
        started = time.monotonic() - self.seconds
        while self.step < self.plan.steps:
            loss, right = self.one_step()
            last = self.step == self.plan.steps
            if self.step % 50 == 0 or last:
                self.log.append({"step": self.step, "loss": round(loss, 4), "right": round(right, 3)})
                report(f"loss {loss:.3f}, {100 * right:.0f} % right", self.step / self.plan.steps)
            self.seconds = time.monotonic() - started
            if self.step % every == 0 or last:
                self.save()
        self.model.eval()

    def one_step(self) -> tuple[float, float]:
        """One update: its loss in nats a token, and the share of questions that were answered right."""
        device = self.model.device
        packed = pack(self.rows(self.step)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, kept = _answering(self.model, packed, self.sees)
        labels = packed.labels[:, kept]
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in self.trained], self.plan.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += packed.ids.numel()
        right = [one for row in _right(logits.detach(), kept, packed) for one in row]
        return loss.item(), sum(right) / len(right)

    def save(self) -> None:
        """Write weights, moments and the log, whole or not at all."""
        note = {"step": self.step, "seconds": self.seconds, "tokens": self.tokens, "log": self.log}
        save_run(self.checkpoint, self.trained, self.optimizer, note | {"plan": _plain(self.plan)})

    def restore(self) -> None:
        """Go on from the checkpoint. Raises StropError for one that is damaged or of another run."""
        note = restore_run(self.checkpoint, self.trained, self.optimizer, _plain(self.plan))
        self.step, self.seconds = note["step"], note["seconds"]
        self.tokens, self.log = note["tokens"], note["log"]


@torch.no_grad()
def answered(model: PreTrainedModel, rows: Sequence[Asked], sees: Sees) -> list[list[bool]]:
    """Whether greedy decoding would write each question's answer exactly, its end included; a list a row.

    One pass tells: it would if every token of the answer is the likeliest one behind those before it.
    """
    packed = pack(rows).to(model.device)
    return _right(*_answering(model, packed, sees), packed)


def _answering(model: PreTrainedModel, packed: Packed, sees: Sees) -> tuple[Tensor, Tensor]:
    """Logits `[B, K, V]` of the K slots at which some row writes an answer, and those slots `[K]`."""
    kept = (packed.labels != IGNORED).any(0).nonzero()[:, 0]
    logits = model(**packed.inputs(sees), use_cache=False, logits_to_keep=kept).logits
    return logits.float(), kept


def _right(logits: Tensor, kept: Tensor, packed: Packed) -> list[list[bool]]:
    labels, parts = packed.labels[:, kept].cpu(), packed.parts[:, kept].cpu()
    missed = (logits.argmax(-1).cpu() != labels) & (labels != IGNORED)
    counts = -torch.where(labels != IGNORED, parts, 0).amin(1)
    return [
        [not bool(row[part == -1 - question].any()) for question in range(count)]
        for row, part, count in zip(missed, parts, counts.tolist(), strict=True)
    ]


def _plain(plan: Plan) -> dict[str, Any]:
    return asdict(plan) | {"betas": list(plan.betas)}


@torch.no_grad()
def require_placeable(model: PreTrainedModel) -> None:
    """Raise StropError unless the model encodes a document the same anywhere, by masks and positions.

    The model is run, so dropout must be off.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        raise StropError(
            f"{name} runs on {config._attn_implementation} attention, which takes no document masks: load it "
            'with attn_implementation="sdpa"'
        )
    windows = [] if getattr(config, "sliding_window", None) is None else ["sliding_attention"]
    if set(getattr(config, "layer_types", None) or windows) - {"full_attention"}:
        raise StropError(
            f"{name} has layers without full attention, which a document mask would change: take a model "
            "whose layers all see everything"
        )
    first, second, *questions = (
        (torch.arange(i, i + PROBE) % config.vocab_size).tolist() for i in range(0, 6 * PROBE, PROBE)
    )
    asked = tuple(zip(questions[::2], questions[1::2], strict=True))
    both, one = pack([Asked((first, second), asked)]), pack([Asked((first, second), asked[1:])])

    def logits(packed: Packed, part: int) -> Tensor:
        packed = packed.to(model.device)
        return model(**packed.inputs(alone), use_cache=False).logits[packed.parts == part].float()

    apart = [
        logits(both, 1) - logits(pack([Asked((second,), asked)]), 0),
        logits(both, -2) - logits(one, -1),
    ]
    bound = ROUNDING * logits(both, 1).abs().max()
    if not max(float(difference.abs().max()) for difference in apart) <= bound:
        raise StropError(
            f"{name} does not encode a document the same at every place, as rotary positions do, so its keys "
            "cannot be reused elsewhere: take a model with rotary positions"
        )
