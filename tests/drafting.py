"""Tiny seeded targets, and drafters of every kind for them with random weights; and one that lies."""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from random import Random
from typing import Any

import torch
from conftest import CONFIGS, VOCABULARY
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from strop.decode.checkpoint import new_config
from strop.decode.cost import CostModel
from strop.decode.dflash import DFlashDrafter, DFlashNet
from strop.decode.drafter import Drafter
from strop.decode.ngram import NGram
from strop.decode.proposal import Proposal, marginals
from strop.decode.small_lm import SmallLM
from strop.decode.treeflash import Approximator, TreeFlashDrafter

BLOCK = 6
ROWS = 4
DRAFTERS = ("ngram", "dflash", "treeflash", "small", "liar")
CURVES = {"steep": {1: 1.0, 128: 6350.0}, "affine": {1: 1.0, 128: 10.0}, "flat": {1: 1.0, 128: 1.001}}


@cache
def target(name: str = "qwen3", seed: int = 0, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """Two layers of width 32 that tests must leave as they are."""
    config = CONFIGS[name]
    config.vocab_size = vocabulary
    if isinstance(config, GPT2Config):
        config.n_embd = 32
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def cost(name: str) -> CostModel:
    """Under a steep one no node pays, under a flat one all do."""
    return CostModel({1: CURVES[name]}, draft_s=0.5)


def net(model: PreTrainedModel, seed: int = 0, block: int = BLOCK, **settings: Any) -> DFlashNet:
    torch.manual_seed(seed)
    return DFlashNet(new_config(model, 2, block, 0, taps=[0, 1], **settings)).eval()


def approximator(trunk: DFlashNet, seed: int = 0) -> Approximator:
    """One whose corrections are not zero."""
    torch.manual_seed(seed)
    made = Approximator(trunk.config)
    torch.nn.init.normal_(made.d.weight, std=0.5)
    return made


class Liar(Drafter):
    """Random tables of random tokens, with links to anywhere; where it knows the text, often the truth."""

    def __init__(self, seed: int = 0, horizon: int = 9, truth: float = 0.8, vocabulary: int = VOCABULARY):
        self.seed, self.horizon, self.truth, self.vocabulary = seed, horizon, truth, vocabulary
        self.known: Sequence[int] = ()
        self.reset()

    def reset(self) -> None:
        self.chance = Random(self.seed)

    def propose(self, ids: Sequence[int], width: int) -> Proposal:
        depths, rows = self.chance.randint(1, self.horizon), self.chance.randint(1, 3)
        wide = min(width, self.vocabulary, 5)
        shape = (depths, rows, wide)
        draw = torch.Generator().manual_seed(self.chance.randrange(1 << 30))
        tokens = torch.rand(depths, rows, self.vocabulary, generator=draw).argsort(-1)[..., :wide]
        for depth, token in enumerate(self.known[len(ids) : len(ids) + depths]):
            for row in tokens[depth]:
                if self.chance.random() < self.truth and token not in row:
                    row[0 if self.chance.random() < 0.9 else self.chance.randrange(wide)] = token
        logp = torch.randn(shape, generator=draw).mul(10).log_softmax(-1).sort(-1, descending=True).values
        links = torch.randint(-1, rows, shape, generator=draw)
        if self.chance.random() < self.truth:
            links.clamp_(min=0)
        links[-1] = -1
        return Proposal("markov", tokens, logp, links)

    def sample(self, ids: Sequence[int]) -> Proposal:
        draw = torch.Generator().manual_seed(self.chance.randrange(1 << 30))
        return marginals(torch.randn(self.horizon, self.vocabulary, generator=draw), 1, sampled=True)


def drafter(kind: str, model: PreTrainedModel, seed: int = 0) -> Drafter:
    """A drafter of a kind for a model; random weights draft badly, which must not matter."""
    if kind == "ngram":
        return NGram()
    if kind == "liar":
        return Liar(seed)
    if kind == "small":
        small = deepcopy(model)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter) * parameter.std())
        return SmallLM(small, model)
    trunk = net(model, seed)
    if kind == "dflash":
        return DFlashDrafter(trunk, model)
    return TreeFlashDrafter(trunk, approximator(trunk, seed), model, ROWS)
