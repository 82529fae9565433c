"""Methods that score tokens by the attention that the newest queries pay them."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import avg_pool1d

from strop.kernels.evict import kernels
from strop.kv.evicting import Candidates, EvictingKV


@dataclass(frozen=True, kw_only=True)
class ObservedKV(EvictingKV):
    """An evicting method that looks at the newest `window` queries."""

    window: int = 64
    """Newest queries whose attention is averaged, `budget` of them at most."""
    smooth: int = 5
    """Tokens in time that an average pool spreads attention over; odd, 1 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.smooth < 1 or self.smooth % 2 == 0:
            raise ValueError(f"window must be at least 1 and smooth odd, got {self.window} and {self.smooth}")

    def attention(self, candidates: Candidates) -> Tensor:
        """Mean probability over queries and the heads of a group, smoothed: `[B, H_kv, n]` float32.

        The softmax runs over the candidates alone (arXiv 2606.03928, equations 1 and 2).
        """
        keys = candidates.keys
        lengths = keys.new_full((len(keys),), keys.shape[2], dtype=int)
        kernel = kernels(keys.device.type)
        observed = kernel.observe(candidates.queries, keys, lengths, candidates.scaling)
        return avg_pool1d(observed, self.smooth, stride=1, padding=self.smooth // 2)
