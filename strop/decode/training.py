"""Training drafters on a frozen target: anchored blocks, denoised in one packed pass (arXiv 2602.06036).

A block starts at an anchor among the tokens that the target wrote. Its slots see the context strictly before
the anchor, whose features are all that decoding will have, and each other; slot k is charged for the token at
anchor + k, earlier slots more. DFlash learns by cross-entropy; TreeFlash's approximator (arXiv 2606.03819)
learns by the divergence from the target's own distribution, with the true token before each slot.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from strop.core.errors import StropError
from strop.core.hooks import decoder_layers, outputs_of
from strop.core.training import restore_run, save_run
from strop.decode.corpus import Report, Rows
from strop.decode.dflash import DFlashNet
from strop.decode.treeflash import Approximator

Loss = Callable[["Blocks"], Tensor]
PROBE = 16
"""Tokens on which the target's logits are compared with its head."""
ROUNDING = 1e-3
"""Share of the largest logit by which they may differ."""


@dataclass(frozen=True)
class Plan:
    """How to optimise."""

    steps: int
    batch: int = 16
    """Rows a step."""
    anchors: int = 64
    """Blocks a row."""
    lr: float = 6e-4
    warmup: float = 0.04
    """Share of the steps over which the learning rate rises; it falls along a cosine after."""
    gamma: float = 4.0
    """Slot k weighs exp(-(k - 1) / gamma)."""
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """The learning rate of a step counted from 0."""
        rising = (step + 1) / max(self.warmup * self.steps, 1)
        return self.lr * min(rising, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class Blocks:
    """A batch of A anchored blocks in each of B rows, denoised; L = N - 1 drafted slots in each."""

    h: Tensor
    """States of the drafted slots before the final norm, `[B, A, L, d]`."""
    n: Tensor
    """The same after it."""
    ids: Tensor
    """The true tokens of all slots, the anchor's first, `[B, A, N]`."""
    weight: Tensor
    """What each drafted slot counts, `[B, A, L]`; 0 behind the end of a row."""
    hidden: Tensor
    """The target's final states that predict the drafted slots, `[B, A, L, d]`."""


class Blockwise:
    """Cuts rows into anchored blocks and runs target and drafter over them."""

    def __init__(self, target: PreTrainedModel, net: DFlashNet, gamma: float) -> None:
        require_bare_head(target)
        self.target, self.net, self.gamma = target.requires_grad_(False).eval(), net, gamma
        self.embed, self.head = target.get_input_embeddings(), target.get_output_embeddings()
        layers, wanted = decoder_layers(target), net.config.dflash_config["target_layer_ids"]
        self.taps = [layers[i] for i in wanted]
        self.size = net.config.block_size
        self.mask_id = net.config.dflash_config["mask_token_id"]

    def __call__(self, rows: Rows, anchors: Tensor) -> Blocks:
        """Denoise the blocks that start at `anchors` `[B, A]` of `rows`."""
        ids, device = rows.ids, rows.ids.device
        with torch.no_grad(), outputs_of(self.taps) as taps:
            hidden = self.target.base_model(input_ids=ids, use_cache=False).last_hidden_state
            features = torch.cat(taps, dim=-1)
        (batch, count), width = anchors.shape, ids.shape[1]
        places = anchors[..., None] + torch.arange(self.size, device=device)
        known = places.clamp(max=width - 1).flatten(1)
        true = ids.gather(1, known).view(batch, count, self.size)
        block = torch.full_like(true, self.mask_id)
        block[..., 0] = true[..., 0]
        positions = torch.cat(
            [torch.arange(width, device=device).expand(batch, -1), places.flatten(1)], dim=1
        )
        h = self.net(
            self.embed(block.flatten(1)), features, positions, mask=block_mask(anchors, width, self.size)
        )
        h = h.view(batch, count, self.size, -1)[:, :, 1:]
        before = known.view(batch, count, self.size)[..., :-1].flatten(1)
        hidden = hidden.gather(1, before[..., None].expand(-1, -1, hidden.shape[-1])).view(h.shape)
        inside = places[..., 1:] < rows.end[:, None, None]
        fading = torch.exp(-torch.arange(self.size - 1, device=device) / self.gamma)
        return Blocks(h, self.net.norm(h), true, inside * fading, hidden)


@torch.no_grad()
def require_bare_head(target: PreTrainedModel) -> None:
    """Raise StropError unless the target's logits are its head of its final states, as a drafter's are."""
    ids = torch.arange(PROBE, device=target.device)[None] % target.get_input_embeddings().weight.shape[0]
    states = target.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = target(input_ids=ids, use_cache=False).logits.float()
    apart = (target.get_output_embeddings()(states).float() - logits).abs().max()
    if not apart <= ROUNDING * logits.abs().max():
        raise StropError(
            f"{type(target).__name__} caps or scales the logits of its head, which block drafters, who draft "
            "by the head alone, cannot follow: draft with n-grams or a small model"
        )


def block_mask(anchors: Tensor, width: int, size: int) -> Tensor:
    """What each slot sees, `[B, 1, A * N, T + A * N]` bool: context before its anchor, and its own block."""
    count = anchors.shape[1]
    before = torch.arange(width, device=anchors.device) < anchors[..., None]
    own = torch.eye(count, dtype=torch.bool, device=anchors.device).repeat_interleave(size, 0)
    context = before.repeat_interleave(size, 1)
    blocks = own.repeat_interleave(size, 1).expand(len(anchors), -1, -1)
    return torch.cat([context, blocks], dim=-1)[:, None]


def draw_anchors(rows: Rows, count: int, draw: torch.Generator) -> Tensor:
    """`[B, count]`: places among what the target wrote, with a token behind each."""
    share = torch.rand(len(rows), count, generator=draw).to(rows.start.device)
    first = rows.start.clamp(min=1)
    last = (rows.end - 1).clamp(min=2)
    return (first[:, None] + share * (last - first).clamp(min=1)[:, None]).long()


def dflash_loss(trunk: Blockwise) -> Loss:
    """Cross-entropy of the drafted slots with what the target wrote."""

    def loss(blocks: Blocks) -> Tensor:
        logits = trunk.head(blocks.n).float()
        nats = cross_entropy(logits.flatten(0, -2), blocks.ids[..., 1:].flatten(), reduction="none")
        return _mean(nats.view_as(blocks.weight), blocks.weight)

    return loss


def distilled_loss(trunk: Blockwise) -> Loss:
    """Divergence of the drafted slots from the target's distribution, which teaches more than a token."""

    def loss(blocks: Blocks) -> Tensor:
        p = trunk.head(blocks.hidden).float().log_softmax(-1)
        return _mean(divergence(p, trunk.head(blocks.n)), blocks.weight)

    return loss


def treeflash_loss(trunk: Blockwise, approximator: Approximator) -> Loss:
    """Divergence of the corrected slots from the target's distribution."""

    def loss(blocks: Blocks) -> Tensor:
        p = trunk.head(blocks.hidden).float().log_softmax(-1)
        o = approximator(trunk.embed(blocks.ids[..., :-1]), blocks.n)
        return _mean(divergence(p, trunk.head(trunk.net.norm(blocks.h + o))), blocks.weight)

    return loss


def _mean(nats: Tensor, weight: Tensor) -> Tensor:
    """0 where nothing counts, as when the target ended every row at once."""
    return (nats * weight).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def divergence(logp: Tensor, logits: Tensor) -> Tensor:
    """KL(p || q) in nats, `[...]`, of log-probabilities and logits `[..., V]`."""
    return (logp.exp() * (logp - logits.float().log_softmax(-1))).sum(-1)


class Trainer:
    """One training run in a folder: AdamW with a checkpoint from which a killed run goes on."""

    def __init__(
        self, trunk: Blockwise, trained: nn.Module, loss: Loss, rows: Rows, plan: Plan, out: Path
    ) -> None:
        self.trunk, self.trained, self.loss, self.rows, self.plan, self.out = (
            trunk,
            trained,
            loss,
            rows,
            plan,
            out,
        )
        self.step, self.seconds, self.log = 0, 0.0, []
        self.optimizer = torch.optim.AdamW(
            trained.parameters(), lr=plan.lr, betas=(0.9, 0.95), weight_decay=plan.weight_decay
        )

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.safetensors"

    def run(self, report: Report, every: int = 200) -> None:
        """Train to the plan's end; `report` hears the loss, and a checkpoint is kept `every` steps."""
        if self.checkpoint.exists():
            self.restore()
        started = time.monotonic() - self.seconds
        while self.step < self.plan.steps:
            loss = self.one_step()
            self.step += 1
            last = self.step == self.plan.steps
            if self.step % 20 == 0 or last:
                self.log.append({"step": self.step, "loss": round(float(loss), 4)})
                report(f"loss {self.log[-1]['loss']:.3f}", self.step / self.plan.steps)
            self.seconds = time.monotonic() - started
            if self.step % every == 0 or last:
                self.save()

    def one_step(self) -> Tensor:
        """One update; its rows and anchors follow from the step alone."""
        device = self.trunk.target.device
        draw = torch.Generator().manual_seed(self.plan.seed << 32 | self.step)
        index = torch.randint(len(self.rows), (self.plan.batch,), generator=draw)
        rows = self.rows.at(index, device)
        anchors = draw_anchors(rows, self.plan.anchors, draw)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = self.loss(self.trunk(rows, anchors))
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), self.plan.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def save(self) -> None:
        """Write weights, moments and the log, whole or not at all."""
        note = {"step": self.step, "seconds": self.seconds, "log": self.log, "plan": asdict(self.plan)}
        save_run(self.checkpoint, self.trained.named_parameters(), self.optimizer, note)

    def restore(self) -> None:
        """Go on from the checkpoint. Raises StropError for one that is damaged or of another run."""
        parameters = self.trained.named_parameters()
        note = restore_run(self.checkpoint, parameters, self.optimizer, asdict(self.plan))
        self.step, self.seconds, self.log = note["step"], note["seconds"], note["log"]
