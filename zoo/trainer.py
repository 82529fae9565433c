"""One training loop for the bundled language models: AdamW, warm-up, a plateau, a linear decay.

- Batches are a function of the step alone, so a run that was killed and started again with the same
  `--out` goes on where its last checkpoint stood, with the same data and the same dropout masks.
- Weights are float32, matrix products bfloat16 (autocast); the saved model is bfloat16.
- Checkpoints are one safetensors file, optimizer moments included, replaced atomically.
- How a step is cut into micro-batches depends on the device and changes memory, not the optimum.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

IGNORED = -100
"""Label of a position that bears no loss."""

_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, which plans anew for every shape, at ten times the cost of a step."""


@dataclass(frozen=True)
class Plan:
    """How to optimise; the data's shape belongs to the batches."""

    steps: int
    lr: float = 2e-3
    warmup: int = 200
    decay: float = 0.3
    """Last share of the steps, over which the learning rate falls linearly to zero."""
    weight_decay: float = 0.1
    clip: float = 1.0
    dropout: float = 0.0
    """Probability of dropping an activation behind embedding, attention and feed-forward layers."""
    betas: tuple[float, float] = (0.9, 0.95)
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """Warm-up, plateau, decay: the learning rate of a step counted from 0."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup, left)


Penalty = Callable[[Sequence[Tensor]], Tensor]
"""Of the routers' logits `[B * T, E]`, one tensor a layer: what the loss of every token is raised by."""


class Batches(Protocol):
    """Where rows come from, and what the run may tell their source."""

    def rows(self, step: int) -> list[tuple[list[int], list[int]]]:
        """(token ids, labels) rows of a step, the label of position t being the token at t + 1."""
        ...

    def observe(self, exact: float) -> None:
        """Hear which share of the last rows had every labelled token right, 0 to 1."""
        ...

    def state(self) -> dict[str, Any]:
        """What `rows` depends on besides the step, for the checkpoint."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a state that `state` gave."""
        ...


def collate(rows: Sequence[tuple[list[int], list[int]]], pad: int, most: int) -> list[tuple[Tensor, Tensor]]:
    """Rows, sorted by length, as right-padded micro-batches `[B, T]` of about `most` tokens.

    Widths are multiples of 64: few different shapes, for which kernels are prepared once each.
    """
    batches: list[tuple[Tensor, Tensor]] = []
    pending: list[tuple[list[int], list[int]]] = []
    for row in sorted(rows, key=lambda r: len(r[0])):
        if pending and (len(pending) + 1) * len(row[0]) > most:
            batches.append(_padded(pending, pad))
            pending = []
        pending.append(row)
    return [*batches, _padded(pending, pad)]


def _padded(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    width = -(-max(len(ids) for ids, _ in rows) // 64) * 64
    ids = torch.tensor([r + [pad] * (width - len(r)) for r, _ in rows])
    labels = torch.tensor([r + [IGNORED] * (width - len(r)) for _, r in rows])
    return ids, labels


class Run:
    """A training run bound to a folder: it resumes, it checkpoints, it keeps its own log."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Batches,
        plan: Plan,
        out: Path,
        device: str,
        micro_tokens: int,
        penalty: Penalty | None = None,
        checkpoint_every: int = 250,
    ) -> None:
        self.model, self.penalty = model.to(device), penalty
        self.batches, self.plan, self.out, self.device = batches, plan, out, device
        self.micro_tokens, self.checkpoint_every = micro_tokens, checkpoint_every
        self.step, self.seconds, self.tokens, self.exact = 0, 0.0, 0, 0.0
        self.log: list[dict[str, Any]] = []
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": plan.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=plan.lr,
            betas=plan.betas,
            fused=True,
        )
        if self.checkpoint.is_file():
            self._resume()

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.safetensors"

    def train(self, until: int | None = None) -> None:
        """Run to step `until` (default: the plan's end), with a checkpoint on the way and there."""
        end = min(self.plan.steps, until or self.plan.steps)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with ExitStack() as stack:
            bar = stack.enter_context(Progress(*columns, TimeRemainingColumn()))
            task = bar.add_task("training", total=end, completed=self.step)
            for handle in _dropout_hooks(self.model, self.plan.dropout):
                stack.callback(handle.remove)
            self.model.train()
            started = time.monotonic()
            while self.step < end:
                self.one_step()
                bar.update(task, completed=self.step)
                if self.log and self.log[-1]["step"] == self.step:
                    bar.console.print(self.log[-1], highlight=False)
                if self.step % self.checkpoint_every == 0 or self.step == end:
                    now = time.monotonic()
                    self.seconds += now - started
                    started = now
                    self._save()
        self.model.eval()

    def one_step(self) -> None:
        """One update of the weights; every tenth step the batches hear how it went."""
        torch.manual_seed(self.plan.seed * 1_000_003 + self.step)
        parts = collate(self.batches.rows(self.step), 0, self.micro_tokens)
        labelled = sum(int((labels != IGNORED).sum()) for _, labels in parts)
        loss_sum = torch.zeros((), device=self.device)
        exact = torch.zeros((), device=self.device)
        for ids, labels in parts:
            loss, extra, right = self._loss(ids.to(self.device), labels.to(self.device))
            ((loss + extra) / labelled).backward()
            loss_sum += loss.detach()
            exact += right.all(dim=1).sum()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens += sum(ids.numel() for ids, _ in parts)
        self.step += 1
        if self.step % 10 == 0:
            self.exact = float(exact) / sum(len(ids) for ids, _ in parts)
            self.batches.observe(self.exact)
        if self.step % 100 == 0 or self.step == self.plan.steps:
            entry = {"step": self.step, "loss": round(float(loss_sum) / labelled, 4)}
            self.log.append(entry | {"exact": round(self.exact, 3)} | self.batches.state())

    def _loss(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | float, Tensor]:
        """Summed cross-entropy, summed penalty, and which positions `[B, T]` are right or unlabelled."""
        wanted = {} if self.penalty is None else {"output_router_logits": True}
        with torch.autocast(self.device, torch.bfloat16), sdpa_kernel(_ATTENTION):
            out = self.model(input_ids=ids, use_cache=False, **wanted)
        loss = F.cross_entropy(
            out.logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        extra = 0.0 if self.penalty is None else self.penalty(out.router_logits) * (labels != IGNORED).sum()
        return loss, extra, (out.logits.detach().argmax(-1) == labels) | (labels == IGNORED)

    def _save(self) -> None:
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"weight/{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value.detach().contiguous()
        note = {"step": self.step, "seconds": self.seconds, "tokens": self.tokens}
        note |= {"log": self.log, "batches": self.batches.state(), "plan": asdict(self.plan)}
        self.out.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        save_file(tensors, partial, metadata={"run": json.dumps(note)})
        os.replace(partial, self.checkpoint)

    def _resume(self) -> None:
        with safe_open(self.checkpoint, framework="pt", device=self.device) as stored:
            note = json.loads(stored.metadata()["run"])
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(stored.get_tensor(f"weight/{name}"))
                    self.optimizer.state[parameter] = {
                        key: stored.get_tensor(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")
                    }
        self.step, self.seconds = note["step"], note["seconds"]
        self.tokens, self.log = note["tokens"], note["log"]
        self.batches.restore(note["batches"])


def _dropout_hooks(model: nn.Module, p: float) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that drop activations behind the modules which write to the residual stream."""
    if p == 0:
        return []
    ends = ("embed_tokens", "o_proj", ".mlp")
    sites = [m for name, m in model.named_modules() if name.endswith(ends)]
    return [m.register_forward_hook(lambda _m, _a, out: F.dropout(out, p, training=True)) for m in sites]
