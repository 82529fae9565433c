"""CurDKV: keep the tokens that a CUR decomposition of keys and values would, by leverage.

Leverage is estimated as the product of the norms of a key and a value under one random projection, drawn once
(arXiv 2509.15038, as restated in arXiv 2606.03928, section 3.2). VaSE-DKV draws it anew at every eviction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from strop.core.sampling import keyed_normal
from strop.kv.evicting import Candidates, EvictingKV


@dataclass(frozen=True, kw_only=True)
class CurDKV(EvictingKV):
    """Keep the tokens of the highest leverage."""

    rank: int = 20
    """Dimensions of the projection, r."""
    sinks: int = 4
    """First tokens, which always stay."""
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rank <= 4096 or not 0 <= self.sinks <= self.budget - self.buffer:
            raise ValueError(
                f"rank must be from 1 to 4096, sinks from 0 to budget - buffer, got {self.rank}, {self.sinks}"
            )

    def drawn(self, candidates: Candidates) -> tuple[int | str, ...]:
        """The key of the projection: one for all evictions of a layer."""
        return self.seed, "leverage", candidates.layer

    @property
    def reserved(self) -> int:
        return self.sinks

    def scores(self, candidates: Candidates) -> Tensor:
        keys, values = candidates.keys.float(), candidates.values.float()
        projection = keyed_normal((keys.shape[-1], self.rank), *self.drawn(candidates)).to(keys.device)
        leverage = (keys @ projection).square().sum(-1) * (values @ projection).square().sum(-1)
        return leverage.masked_fill(candidates.positions < self.sinks, torch.inf)
