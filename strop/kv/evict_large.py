"""Evict-large: drop the values of the widest range first. The ablation that shows what they are worth."""

from dataclasses import dataclass

from torch import Tensor

from strop.kernels.evict import kernels
from strop.kv.evicting import Candidates, EvictingKV


@dataclass(frozen=True, kw_only=True)
class EvictLarge(EvictingKV):
    """Keep the tokens whose values span the narrowest range."""

    def scores(self, candidates: Candidates) -> Tensor:
        return -kernels(candidates.values.device.type).value_range(candidates.values)
