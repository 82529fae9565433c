"""What a recipe costs in quality, always beside the same checkpoint with an empty recipe.

Perplexity and KL are taken under pseudo-decode: a text is read in blocks, and each block attends to the
cache that the recipe has damaged so far, as it would while generating. A single prefill would compute
attention before anything is coded and never feel a kv method.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from strop.audit.base import LanguageModel
from strop.core.cache import commit
from strop.core.intervals import bootstrap

BLOCK = 64
"""Tokens per step of pseudo-decode."""


@torch.no_grad()
def pseudo_decode(
    model: PreTrainedModel, tokens: Tensor, cache: Cache, block: int = BLOCK
) -> Iterator[Tensor]:
    """Logits `[B, b, V]` float32 of texts `[B, T]`, block after block, through a cache.

    A block is committed before the next is read: nothing is held back for speculation, as in plain decoding.
    """
    for part in tokens.split(block, dim=1):
        yield model(part, past_key_values=cache, use_cache=True).logits.float()
        commit(cache)


@dataclass(frozen=True)
class TokenLosses:
    """Per-token measures of one text, `[T - 1]` each, in nats."""

    base: np.ndarray
    """Negative log-likelihood under the baseline."""
    other: np.ndarray
    """Negative log-likelihood under the recipe."""
    kl: np.ndarray
    """KL divergence from the baseline's distribution to the recipe's."""

    def sums(self, start: int = 0, stop: int | None = None) -> tuple[float, float, float, int]:
        """Of a part: both likelihoods, the divergence, and how many tokens it has."""
        part = slice(start, stop)
        sums = (self.base[part].sum(), self.other[part].sum(), self.kl[part].sum())
        return (*sums, len(self.kl[part]))


def token_losses(
    base: LanguageModel, other: LanguageModel, ids: Sequence[int], block: int = BLOCK
) -> TokenLosses:
    """Read one text with both models in step."""
    tokens = torch.tensor([list(ids)], device=base.device)
    targets = torch.tensor([*ids[1:], 0], device=base.device)
    columns: list[list[Tensor]] = [[], [], []]
    start = 0
    readings = [pseudo_decode(lm.model, tokens, lm.new_cache(), block) for lm in (base, other)]
    for ours, theirs in zip(*readings, strict=True):
        p, q = ours[0].log_softmax(-1), theirs[0].log_softmax(-1)
        index = targets[start : start + len(p), None]
        start += len(p)
        kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
        measures = (-p.gather(1, index)[:, 0], -q.gather(1, index)[:, 0], kl)
        for column, values in zip(columns, measures, strict=True):
            column.append(values)
    return TokenLosses(*(torch.cat(column)[:-1].double().cpu().numpy() for column in columns))


@dataclass(frozen=True)
class TextQuality:
    """Perplexity and KL over texts, with 95 % intervals over texts (over blocks when texts are few)."""

    ppl: float
    ppl_base: float
    ppl_rise: float
    """Relative rise of perplexity, 0.01 is one percent."""
    ppl_rise_lo: float
    ppl_rise_hi: float
    kl: float
    """Mean KL to the baseline per token, nats."""
    kl_lo: float
    kl_hi: float
    tokens: int


FEW_TEXTS = 8


def text_quality(
    base: LanguageModel,
    other: LanguageModel,
    texts: Sequence[Sequence[int]],
    block: int = BLOCK,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> TextQuality:
    """Compare two models on token ids of texts (each at least 2 tokens); `step` is called after each."""
    rows = []
    for ids in texts:
        losses = token_losses(base, other, ids, block)
        size = block if len(texts) < FEW_TEXTS else len(ids)
        rows += [losses.sums(start, start + size) for start in range(0, len(losses.kl), size)]
        step()
    return summary(rows, seed)


def summary(rows: Sequence[tuple[float, float, float, int]], seed: int = 0) -> TextQuality:
    """Perplexity and KL from `TokenLosses.sums` of independent texts or blocks."""
    units = np.array(rows)
    base_nll, other_nll, _, tokens = units.sum(0)

    def rise(sample: np.ndarray) -> np.ndarray:
        totals = sample.sum(1)
        return np.expm1((totals[:, 1] - totals[:, 0]) / totals[:, 3])

    def mean_kl(sample: np.ndarray) -> np.ndarray:
        totals = sample.sum(1)
        return totals[:, 2] / totals[:, 3]

    return TextQuality(
        float(np.exp(other_nll / tokens)),
        float(np.exp(base_nll / tokens)),
        *bootstrap(units, rise, seed),
        *bootstrap(units, mean_kl, seed),
        int(tokens),
    )


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def agreement(base: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> float:
    """Mean share of the baseline's greedy continuation that the recipe repeats before it first departs."""
    return float(np.mean([common_prefix(a, b) / max(len(a), 1) for a, b in zip(base, other, strict=True)]))


def exact_match_loss(
    base: Sequence[bool], other: Sequence[bool], seed: int = 0
) -> tuple[float, float, float] | None:
    """Relative loss of exact match against the baseline's, with its 95 % interval over problems.

    0.01 is one percent of the problems that the baseline solves; negative when the recipe solves more; None
    when the baseline solves none. The upper end is never below `exact_match_floor`.
    """
    if not any(base):
        return None
    units = np.array([base, other], dtype=float).T

    def loss(sample: np.ndarray) -> np.ndarray:
        means = sample.mean(1)
        return (means[:, 0] - means[:, 1]) / np.maximum(means[:, 0], 1 / len(units))

    estimate, low, high = bootstrap(units, loss, seed)
    return estimate, low, max(high, exact_match_floor(sum(base)))


def exact_match_floor(solved: int) -> float:
    """The relative loss that goes unseen on so many problems with a probability of 2.5 %."""
    return 1 - 0.025 ** (1 / solved)
