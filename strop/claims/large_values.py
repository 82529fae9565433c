"""A byte model in which some tokens have large values, planted, and what eviction costs it.

Values of small models differ little from token to token. In the planted twin those of a fixed share of token
ids are multiplied, in training and in use alike, so that the rest of the model has learned to live with them.
It shows what policies do where large values exist, not how often real models have them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from strop.audit.quality import pseudo_decode
from strop.claims.base import Row
from strop.claims.evict_policies import policies
from strop.claims.planted import BYTES, TokenScales, Twin
from strop.kv import SnapKV

SAME = 1e-4
"""Logits that differ by less are those of another kernel."""


@dataclass(frozen=True, kw_only=True)
class LargeValues(Twin):
    """A twin of which some token ids have larger values."""

    sigma: float = 0.0
    share: float = 1 / 16
    """Of all token ids."""
    factor: float = 8.0

    def ids(self) -> Tensor:
        """Which token ids, `[n]`."""
        draw = torch.Generator().manual_seed(self.seed)
        return torch.randperm(BYTES, generator=draw)[: round(self.share * BYTES)]

    def plant(self, model: LlamaForCausalLM) -> None:
        factors = torch.ones(BYTES).index_fill(0, self.ids(), self.factor)
        TokenScales(model, factors, keys=0.0, values=1.0)


def eviction_study(
    name: str,
    model: PreTrainedModel,
    tokens: Tensor,
    budgets: Sequence[int],
    buffer: int,
    step: Callable[[str], None],
) -> list[Row]:
    """KL of every policy on texts `[B, T]` read token by token, from where every budget has evicted on.

    A repetition is a text, with a seed of its own. Raises RuntimeError when a budget above the length changes
    anything.
    """
    step(f"{name}: full cache")
    full = _read(model, tokens, DynamicCache(config=model.config))
    roomy = SnapKV(budget=-(-tokens.shape[1] // buffer) * buffer + buffer, buffer=buffer)
    off = float((_read(model, tokens, roomy.new_cache(model.config)) - full).abs().max())
    if off > SAME:
        raise RuntimeError(f"control failed on {name}: a budget above the length moved log odds by {off}")
    rows, late = [], slice(max(budgets) + buffer, None)
    for budget in budgets:
        for policy, method in policies(budget, buffer, len(tokens)).items():
            step(f"{name}: {policy}, {budget}")
            found = _read(model, tokens, method.new_cache(model.config))
            kl = (full.exp() * (full - found)).sum(-1).clamp(min=0)[:, late].mean(1).tolist()
            rows.append({"study": "eviction", "model": name, "budget": budget, "method": policy, "kl": kl})
    return rows


def _read(model: PreTrainedModel, tokens: Tensor, cache: Cache) -> Tensor:
    """Log probabilities `[B, T, V]`."""
    return torch.cat(list(pseudo_decode(model, tokens, cache, block=1)), 1).log_softmax(-1)
