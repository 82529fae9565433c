"""R-KV: keep what is looked at and unlike the rest.

Attention minus redundancy, the softmax over tokens of a key's mean cosine similarity with the other
candidates (arXiv 2505.24133, as restated in arXiv 2606.03928, section 2). The mean over all others is a
product with the sum of the unit keys, so no n x n matrix is formed.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from strop.kv.evicting import Candidates
from strop.kv.observed import ObservedKV


def redundancy(keys: Tensor) -> Tensor:
    """Softmax over tokens of the mean cosine similarity with the others.

    `[B, H_kv, n, D]` to `[B, H_kv, n]` float32.
    """
    unit = normalize(keys.float(), dim=-1)
    alike = unit @ unit.sum(2, keepdim=True).transpose(-1, -2)
    return ((alike.squeeze(-1) - unit.square().sum(-1)) / keys.shape[2]).softmax(-1)


@dataclass(frozen=True, kw_only=True)
class RKV(ObservedKV):
    """Keep the tokens of high attention and low redundancy."""

    weight: float = 0.5
    """Part of attention in the score, lambda; the rest is minus redundancy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must be from 0 to 1, got {self.weight}")

    def scores(self, candidates: Candidates) -> Tensor:
        attention = self.attention(candidates)
        return self.weight * attention - (1 - self.weight) * redundancy(candidates.keys)
