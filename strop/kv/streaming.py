"""StreamingLLM: keep the first tokens and the newest (arXiv 2309.17453).

Positions stay those of the text; the original counts them inside the cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from strop.kv.evicting import Candidates, EvictingKV


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(EvictingKV):
    """Sinks and a window."""

    sinks: int = 4
    """First tokens, which always stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sinks <= self.budget - self.buffer:
            raise ValueError(f"sinks must be from 0 to budget - buffer, got {self.sinks}")

    @property
    def reserved(self) -> int:
        return self.sinks

    def scores(self, candidates: Candidates) -> Tensor:
        positions = candidates.positions
        return positions.float().masked_fill(positions < self.sinks, torch.inf)
