"""The endpoint that holds most of the prompt, the less loaded where several do.

The baseline "Cache-Aware" of NetKV (arXiv 2606.03910). With `cache_threshold=0.3,balance_abs_threshold=64,
balance_rel_threshold=1.5` it is `cache_aware` of SGLang's gateway, which goes by load where little matches or
load is skewed. Differs from that: what an endpoint holds is what it reports, not a guess from past requests.
"""

from dataclasses import dataclass
from math import inf

import numpy as np

from strop.serve.base import Context, Endpoints, Request, RoutingPolicy
from strop.serve.routing.load import requests


@dataclass(frozen=True)
class CacheAware(RoutingPolicy):
    """Tokens held, negative, and a fraction of one for load; only load where the cache does not decide."""

    needs_hashes = True

    cache_threshold: float = 0.0
    """Share of the prompt that the best endpoint must hold more of for the cache to decide."""
    balance_abs_threshold: float = inf
    """Load decides where the busiest endpoint has this many requests more than the idlest..."""
    balance_rel_threshold: float = 1.0
    """...and more than this many times as many."""

    def __post_init__(self) -> None:
        if not 0 <= self.cache_threshold <= 1:
            raise ValueError(f"cache_threshold must be from 0 to 1, got {self.cache_threshold}")
        if not (self.balance_abs_threshold >= 0 and self.balance_rel_threshold >= 1):
            raise ValueError("balance_abs_threshold must be at least 0 and balance_rel_threshold at least 1")

    def scores(
        self, request: Request, endpoints: Endpoints, context: Context, peer: int | None
    ) -> np.ndarray:
        hits, load = endpoints.hits(request), requests(endpoints, context.local)
        if hits.max() <= self.cache_threshold * request.prompt or self.skewed(load):
            return load
        return load / (load.max() + 1) - hits

    def skewed(self, load: np.ndarray) -> bool:
        """Whether the busiest endpoint is too far above the idlest."""
        most, least = load.max(), load.min()
        return bool(most - least > self.balance_abs_threshold and most > self.balance_rel_threshold * least)
