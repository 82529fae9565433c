"""Random eviction: every candidate has the same chance to stay. An ablation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from strop.core.sampling import key_words
from strop.kernels.evict import kernels
from strop.kv.evicting import Candidates, EvictingKV


@dataclass(frozen=True, kw_only=True)
class RandomEviction(EvictingKV):
    """Keep tokens by chance."""

    seed: int = 0

    def scores(self, candidates: Candidates) -> Tensor:
        positions = candidates.positions
        flat = torch.zeros(positions.shape, device=positions.device)
        words = key_words(self.seed, "evict", candidates.layer, candidates.seen)
        return kernels(positions.device.type).gumbel(flat, positions, *words)
