"""VaSE: keep the tokens whose values span the widest range, and let chance choose among the rest.

A ranking is blind to what later steps will ask for, and drops for good whatever falls just below its cut.
VaSE reserves places for abnormally large values, which carry what is recalled late, and samples the other
places without replacement, so that every token keeps a chance. No training. arXiv 2606.03928, section 3.2.

Differs: noise is keyed by (seed, layer, tokens so far, KV head, position) and the same for every row of a
batch, so that a result does not depend on the batch; sinks are the first tokens of the row by position.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.core.sampling import key_words, keyed_generator
from strop.kernels.evict import kernels
from strop.kv.curdkv import CurDKV
from strop.kv.evicting import Candidates
from strop.kv.observed import ObservedKV

SAMPLERS = ("gumbel", "multinomial", "none")


@dataclass(frozen=True, kw_only=True)
class VaSE(ObservedKV):
    """VaSE-AttnV: reserve places by value range, sample the others by attention."""

    reserve: int | None = None
    """Places for the values of the widest range, N_v; None: a quarter of the budget."""
    sinks: int = 4
    """First tokens, which always take reserved places."""
    temperature: float = 1.0
    """Of the attention that is sampled from."""
    sampler: str = "gumbel"
    """"gumbel": one top-k of noisy log weights; "multinomial": torch's draws one after another, the same
    distribution; "none": the ablation that ranks."""
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sinks <= self.reserved <= self.budget - self.buffer or self.sinks < 0:
            raise ValueError(
                f"reserve ({self.reserved}) must hold the {self.sinks} sinks and leave the newest "
                f"{self.buffer} tokens of {self.budget} their places"
            )
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {SAMPLERS}, got {self.sampler!r}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature}")

    @property
    def reserved(self) -> int:
        """N_v."""
        return self.budget // 4 if self.reserve is None else self.reserve

    def scores(self, candidates: Candidates) -> Tensor:
        kernel = kernels(candidates.keys.device.type)
        wide = kernel.value_range(candidates.values)
        wide = wide.masked_fill(candidates.positions < self.sinks, torch.inf)
        keep = kernel.keep_top(wide, min(self.reserved, wide.shape[-1])).long()
        return self._sampled(candidates, keep).scatter(-1, keep, torch.inf)

    def pool(self, scores: Tensor) -> Tensor:
        """The highest: over log weights with Gumbel noise, a draw of tiles by the sum of their weights."""
        return scores.amax(-1)

    def _sampled(self, candidates: Candidates, keep: Tensor) -> Tensor:
        """Scores whose highest are a sample without replacement, `keep` left out."""
        log_weights = self.attention(candidates).log() / self.temperature
        key = (self.seed, "evict", candidates.layer, candidates.seen)
        if self.sampler == "gumbel":
            kernel = kernels(log_weights.device.type)
            return kernel.gumbel(log_weights, candidates.positions, *key_words(*key))
        if self.sampler == "none":
            return log_weights
        places = self.budget - self.buffer - keep.shape[-1]
        weights = log_weights.exp().clamp(min=torch.finfo(torch.float32).tiny).scatter(-1, keep, 0.0)
        scores = torch.full_like(weights, -torch.inf)
        if not places:
            return scores
        rows = [row.multinomial(places, generator=keyed_generator(*key)) for row in weights.cpu()]
        return scores.scatter(-1, torch.stack(rows).to(scores.device), 0.0)


@dataclass(frozen=True, kw_only=True)
class VaSEDKV(CurDKV):
    """VaSE-DKV: leverage under a projection drawn anew at every eviction. Needs no queries."""

    def drawn(self, candidates: Candidates) -> tuple[int | str, ...]:
        return (*super().drawn(candidates), candidates.seen)
