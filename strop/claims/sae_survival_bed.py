"""What claims about the survival of features are measured on, in float32.

Three bundled models with their sparse autoencoders: the coder, and two seeds of one mixture of experts. A
repetition is some of the held-out sequences. The model as it is reads every sequence once; its features are
kept and each change is read against them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strop.audit.moments import StreamingPearson
from strop.audit.predictor import require_predictor
from strop.audit.sae import SAE
from strop.audit.splice import AT_ONCE
from strop.audit.states import read, sequences
from strop.audit.survival import ENCODED, Survival
from strop.claims.base import Progress
from strop.core.errors import StropError
from strop.core.sampling import keyed_generator
from strop.kv import KVarN, VaSE
from strop.model import Model, load
from strop.models.zoo import zoo_root
from strop.recipe import Recipe
from strop.tasks import python_source
from strop.weights import GPTQ, RTN
from strop.weights.alphaq import AlphaQ
from strop.weights.base import WeightMethod

MODELS = ("zoo:coder", "zoo:moe", "zoo:moe-1")
TILES: dict[str, Any] = {"group": 64, "sinks": 4, "tail": 64}
"""Short, so that a cache of some hundred tokens is mostly codes."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiments are."""

    name: str
    device: str = "cpu"
    models: tuple[str, ...] = MODELS
    seeds: int = 5
    """Repetitions."""
    each: int = 16
    """Sequences of a repetition."""
    length: int = 512
    """Tokens of a sequence."""
    widths: tuple[int, ...] = (8, 7, 6, 5, 4, 3, 2)
    """Bits of rounding with one scale an output channel, from wide to narrow."""
    weights: tuple[WeightMethod, ...] = (RTN(bits=4, group=128), GPTQ(bits=4, group=128, samples=32))
    experts: tuple[WeightMethod, ...] = (AlphaQ(bits=3.5),)
    """For mixtures of experts alone."""
    caches: tuple[Any, ...] = (
        KVarN(bits_k=4, bits_v=2, **TILES),
        KVarN(bits_k=2, bits_v=2, **TILES),
        VaSE(budget=384),
        VaSE(budget=256),
        VaSE(budget=128),
    )
    steps: int = 12
    """Bisections of the share of pruned weights."""
    draws: int = 5
    """Permutations of labels a repetition, and random sets of features."""
    spliced: int = 3
    """Sequences of a repetition in which features are set back."""


SCALES = {
    "cpu": Scale(name="cpu"),
    "gpu": Scale(name="gpu", device="cuda", each=64, spliced=12, draws=20),
}


@dataclass(frozen=True)
class Kept:
    """Some sequences as the model as it is reads them."""

    seed: int
    rows: Tensor
    features: tuple[Tensor, ...]
    """`[ENCODED, m]` each, sparse."""
    loss: float
    """Sum over tokens."""

    @property
    def tokens(self) -> int:
        """Tokens that are predicted."""
        return self.rows[:, 1:].numel()


@dataclass
class Subject:
    """A model, its autoencoder, and held-out text `[seeds, each, length]`."""

    name: str
    lm: Model
    sae: SAE
    rows: Tensor
    kept: list[Kept] = field(default_factory=list)

    def read(self) -> None:
        """Read all text with the model as it is, once."""
        self.kept = []
        for seed, rows in enumerate(self.rows):
            for part in rows.split(AT_ONCE):
                states, loss = read(self.lm, part, self.sae.layer)
                features = tuple(self.sae.encode(some).to_sparse() for some in pieces(states))
                self.kept.append(Kept(seed, part, features, float(loss.double().sum())))

    def follow(self, lm: Model, lossy: bool = False) -> Survival:
        """What became of the features in a changed model, a fold a repetition."""
        stream = StreamingPearson(self.sae.m, len(self.rows), self.lm.device)
        losses = np.zeros((3, len(self.rows)))
        for kept in self.kept:
            states, loss = read(lm, kept.rows, self.sae.layer, lossy)
            for x, some in zip(kept.features, pieces(states), strict=True):
                stream.update(x.to_dense(), self.sae.encode(some), torch.full((len(some),), kept.seed))
            losses[:, kept.seed] += kept.loss, float(loss.double().sum()), loss.numel()
        return Survival(stream, losses)

    def loss(self, lm: Model, kept: Sequence[Kept]) -> float:
        """Mean loss of a changed model on some of the text."""
        sums = [float(read(lm, one.rows, self.sae.layer)[1].double().sum()) for one in kept]
        return sum(sums) / sum(one.tokens for one in kept)

    def before(self, kept: Sequence[Kept]) -> float:
        """The same of the model as it is."""
        return sum(one.loss for one in kept) / sum(one.tokens for one in kept)

    def around(self, model: Any) -> Model:
        """A changed copy of the model as one that can be read."""
        return Model(model, self.lm.tokenizer, Recipe(model=self.name), self.lm.checkpoint)


def pieces(states: Tensor) -> tuple[Tensor, ...]:
    """States `[B, T, d]` as some tokens `[n, d]` at a time."""
    return states.flatten(0, 1).split(ENCODED)


@dataclass(frozen=True)
class Bed:
    """The models."""

    subjects: tuple[Subject, ...]


LAYING = 1
"""Measurements that `lay` announces."""


def lay(scale: Scale, progress: Progress) -> Bed:
    """Load the bundled models with their autoencoders, and draw the text."""
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise StropError("no CUDA device is visible: use --scale cpu, or see `strop doctor`")
    require_predictor()
    progress("reading the texts")
    texts = list(python_source.texts("held_out").values())
    return Bed(tuple(subject(name, texts, scale) for name in scale.models))


def subject(name: str, texts: Sequence[str], scale: Scale) -> Subject:
    """A bundled model and what it reads: sequences drawn by seed 0."""
    lm = load(name, dtype="fp32", device=scale.device)
    sae = SAE.load(zoo_root() / f"{name.removeprefix('zoo:')}-sae").to(lm.device)
    rows = sequences([lm.encode(text) for text in texts], scale.length)
    return Subject(name, lm, sae, drawn(rows, scale))


def drawn(rows: Tensor, scale: Scale) -> Tensor:
    """Sequences `[seeds, each, length]` of `[S, length]`, no one twice."""
    wanted = scale.seeds * scale.each
    if len(rows) < wanted:
        raise StropError(f"there are {len(rows)} sequences to read, and {wanted} are needed")
    order = torch.randperm(len(rows), generator=keyed_generator(0, "sequences"))
    return rows[order[:wanted]].view(scale.seeds, scale.each, scale.length)
