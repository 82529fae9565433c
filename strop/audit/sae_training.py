"""Train a sparse autoencoder on a model's residual stream: TopK, or ReLU under an L1 penalty.

Features that have not fired for long learn to write what the others leave (as in arXiv 2406.04093), in both
forms. Inputs are scaled to a norm of sqrt(d) while training; the factor is folded into what is saved.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strop.audit.base import LanguageModel
from strop.audit.sae import SAE
from strop.audit.states import batches, read, replaced
from strop.core.errors import StropError
from strop.core.sampling import keyed_generator, keyed_normal
from strop.core.training import restore_run, save_run

FORMS = ("topk", "l1")
CHUNK = 32_768
"""Tokens that are read and shuffled together, in whole sequences."""
AT_ONCE = 4096
"""Tokens of one forward pass, in whole sequences."""
AUXILIARY = 1 / 32
"""Weight of what idle features learn."""
WARMUP, FALL = 0.05, 0.2
"""Shares of the steps over which the learning rate rises, and at the end falls."""

Report = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained, and how."""

    layer: int
    m: int
    """Features."""
    form: str = "topk"
    """`topk`, or `l1`."""
    k: int = 32
    """Features that fire at a token, of `topk`."""
    l1: float = 1.0
    """Weight of the penalty, of `l1`."""
    tokens: int = 2_000_000
    """Tokens to learn from; the text is read again where it is shorter."""
    batch: int = 2048
    """Tokens a step."""
    lr: float = 1e-3
    idle: int = 200_000
    """Tokens without firing after which a feature counts as idle."""
    idle_k: int = 128
    """Idle features that learn at a token."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise StropError(f"unknown form {self.form!r}: topk or l1")
        if not 0 < self.k <= self.m or self.tokens < self.batch or self.l1 < 0:
            raise StropError(
                f"an autoencoder of {self.m} features fires 1 to {self.m} of them at a token and learns from "
                f"{self.batch} tokens or more, got k = {self.k} and {self.tokens} tokens"
            )


class Trainer:
    """One training run, whose steps follow from their number alone."""

    def __init__(
        self, lm: LanguageModel, rows: Tensor, settings: Settings, checkpoint: Path, skip: int = 0
    ) -> None:
        """`rows` `[S, T]` are token ids of the text; nothing is learnt at the first `skip` of a sequence."""
        self.lm, self.rows, self.settings, self.checkpoint = lm, rows, settings, checkpoint
        self.skip = skip
        self.size, self.per_chunk = chunk_of(rows, settings, skip)
        self.chunks = math.ceil(settings.tokens / (self.per_chunk * settings.batch))
        self.chunk, self.seconds, self.log = 0, 0.0, list[dict[str, float]]()
        first = self._states(0)
        d, m = first.shape[1], settings.m
        self.factor = math.sqrt(d) / float(first.norm(dim=1).mean())
        directions = keyed_normal((m, d), settings.seed, "sae").to(lm.device)
        directions /= directions.norm(dim=1, keepdim=True)
        self.parameters = {
            "w_enc": nn.Parameter(directions.T.contiguous()),
            "b_enc": nn.Parameter(torch.zeros(m, device=lm.device)),
            "w_dec": nn.Parameter(directions),
            "b_dec": nn.Parameter(first.mean(0) * self.factor),
        }
        self.since = torch.zeros(m, device=lm.device)
        """Tokens since each feature fired."""
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=settings.lr, betas=(0.9, 0.999))

    @property
    def steps(self) -> int:
        """Updates in all."""
        return self.chunks * self.per_chunk

    def run(self, report: Report = lambda what, share: None) -> SAE:
        """Train to the end, going on where a killed run stopped."""
        if self.checkpoint.exists():
            plan = asdict(self.settings)
            note = restore_run(
                self.checkpoint, self.parameters.items(), self.optimizer, plan, {"since": self.since}
            )
            self.chunk, self.seconds, self.log = note["chunk"], note["seconds"], note["log"]
        started = time.monotonic() - self.seconds
        while self.chunk < self.chunks:
            states = self._states(self.chunk) * self.factor
            states = states[torch.randperm(len(states), generator=self._draw("tokens", self.chunk))]
            for index in range(self.per_chunk):
                part = states[index * self.settings.batch : (index + 1) * self.settings.batch]
                told = self._step(part, self.chunk * self.per_chunk + index)
            self.chunk += 1
            self.seconds = time.monotonic() - started
            self.log.append({"chunk": self.chunk} | told)
            report(
                f"unexplained {told['unexplained']:.3f}, idle {told['idle']:.0f}", self.chunk / self.chunks
            )
            self._save()
        return self.folded()

    def _draw(self, *key: int | str) -> torch.Generator:
        return keyed_generator(self.settings.seed, "sae", *key)

    def _states(self, chunk: int) -> Tensor:
        """States `[tokens, d]` of the sequences of a chunk; each pass over the text has its own order."""
        turn, place = divmod(chunk, len(self.rows) // self.size)
        order = torch.randperm(len(self.rows), generator=self._draw("rows", turn))
        picked = self.rows[order[place * self.size : (place + 1) * self.size]]
        parts = [read(self.lm, part, self.settings.layer)[0] for part in batches(picked, AT_ONCE)]
        return torch.cat(parts)[:, self.skip :].flatten(0, 1)

    def _step(self, x: Tensor, step: int) -> dict[str, float]:
        """One update on scaled states `[batch, d]`."""
        w_enc, b_enc, w_dec, b_dec = self.parameters.values()
        pre = torch.addmm(b_enc, x - b_dec, w_enc)
        fires = pre.relu()
        if self.settings.form == "topk":
            kept = fires.topk(self.settings.k, dim=1, sorted=False)
            fires = torch.zeros_like(fires).scatter(1, kept.indices, kept.values)
        left = x - b_dec - fires @ w_dec
        loss = left.pow(2).sum(1).mean()
        spread = (x - x.mean(0)).pow(2).sum(1).mean()
        unexplained = float(loss.detach() / spread)
        if self.settings.form == "l1":
            rising = min((step + 1) / (WARMUP * self.steps), 1.0)
            loss = loss + self.settings.l1 * rising * fires.sum(1).mean()
        idle = self.since > self.settings.idle
        loss = loss + AUXILIARY * self._idle_loss(pre, left.detach(), idle)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * min(
                (step + 1) / (WARMUP * self.steps), (self.steps - step) / (FALL * self.steps), 1.0
            )
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            w_dec.grad -= (w_dec.grad * w_dec).sum(1, keepdim=True) * w_dec
            self.optimizer.step()
            w_dec /= w_dec.norm(dim=1, keepdim=True)
            self.since += len(x)
            self.since[(fires > 0).any(0)] = 0
        return {
            "unexplained": unexplained,
            "idle": int(idle.sum()),
            "fires": float((fires > 0).sum(1).float().mean()),
        }

    def _idle_loss(self, pre: Tensor, left: Tensor, idle: Tensor) -> Tensor:
        """How badly the strongest idle features write what the others left, relative to its size."""
        among = idle.nonzero()[:, 0]
        if not len(among):
            return pre.new_zeros(())
        kept = pre[:, among].topk(min(self.settings.idle_k, len(among)), dim=1, sorted=False)
        fires = torch.zeros_like(pre[:, among]).scatter(1, kept.indices, kept.values.relu())
        written = fires @ self.parameters["w_dec"][among]
        return (left - written).pow(2).sum(1).mean()

    def _save(self) -> None:
        note = {"chunk": self.chunk, "seconds": self.seconds, "log": self.log, "plan": asdict(self.settings)}
        save_run(self.checkpoint, self.parameters.items(), self.optimizer, note, {"since": self.since})

    @torch.no_grad()
    def folded(self) -> SAE:
        """The autoencoder of states as they are: activations and biases carry the factor."""
        w_enc, b_enc, w_dec, b_dec = (tensor.detach().clone() for tensor in self.parameters.values())
        topk = self.settings.form == "topk"
        return SAE(
            w_enc=w_enc,
            b_enc=b_enc / self.factor,
            w_dec=w_dec,
            b_dec=b_dec / self.factor,
            layer=self.settings.layer,
            form="topk" if topk else "relu",
            k=self.settings.k if topk else 0,
            centred=True,
        )


def chunk_of(rows: Tensor, settings: Settings, skip: int) -> tuple[int, int]:
    """Sequences of a chunk, and steps. Raises StropError where the text is less than one step."""
    size = min(max(CHUNK // rows.shape[1], 1), len(rows))
    steps = size * (rows.shape[1] - skip) // settings.batch
    if not steps:
        raise StropError(
            f"the text to learn from has {rows.numel()} tokens, less than one step of {settings.batch}: "
            "give more text, or an autoencoder"
        )
    return size, steps


@torch.no_grad()
def judged(lm: LanguageModel, sae: SAE, rows: Tensor, skip: int = 0) -> dict[str, Any]:
    """How well an autoencoder stands for the stream, on token ids `[S, T]` that it has not seen.

    The first `skip` tokens of a sequence stay as they are and count nowhere.
    `loss_recovered` is 1 where the model reads on as well from what it writes, and 0 where as badly as from
    zeros.
    """
    square = spread = fires = tokens = 0.0
    losses = {"as is": 0.0, "written": 0.0, "zeros": 0.0}
    ever = torch.zeros(sae.m, dtype=torch.bool, device=lm.device)
    for part in batches(rows, AT_ONCE):
        whole, loss = read(lm, part, sae.layer)
        states = whole[:, skip:]
        features = sae.encode(states)
        written = sae.decode(features, states)
        square += float((states - written).pow(2).sum())
        spread += float((states - states.mean((0, 1))).pow(2).sum())
        fires += float((features > 0).sum())
        ever |= (features > 0).flatten(0, 1).any(0)
        tokens += states.shape[0] * states.shape[1]
        losses["as is"] += float(loss.sum())
        for name, instead in (("written", written), ("zeros", torch.zeros_like(states))):
            with replaced(lm.model, sae.layer, [torch.cat([whole[:, :skip], instead], 1)]):
                losses[name] += float(read(lm, part, sae.layer)[1].sum())
    recovered = (losses["zeros"] - losses["written"]) / (losses["zeros"] - losses["as is"])
    predicted = len(rows) * (rows.shape[1] - 1)
    return {
        "explained_variance": 1 - square / spread,
        "fires_per_token": fires / tokens,
        "never_fired": float((~ever).float().mean()),
        "loss": losses["as is"] / predicted,
        "loss_written": losses["written"] / predicted,
        "loss_recovered": recovered,
        "tokens": int(tokens),
    }
