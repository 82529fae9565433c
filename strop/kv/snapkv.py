"""SnapKV while decoding: keep what the newest queries look at most.

arXiv 2404.14469, in the periodic form that the VaSE paper compares with (arXiv 2606.03928, section 2): scored
at every eviction, prompt and answer alike.
"""

from dataclasses import dataclass

from torch import Tensor

from strop.kv.evicting import Candidates
from strop.kv.observed import ObservedKV


@dataclass(frozen=True, kw_only=True)
class SnapKV(ObservedKV):
    """Keep the tokens of the highest attention."""

    def scores(self, candidates: Candidates) -> Tensor:
        return self.attention(candidates)
