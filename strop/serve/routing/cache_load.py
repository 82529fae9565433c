"""A weighted sum of what must be brought and of load, blind to the network.

The baseline "CLA*" of NetKV (arXiv 2606.03910), whose weights are tuned for each workload
(`strop.serve.tuning`). Its exact form is not at hand; here both terms are shares in [0, 1]. Only w_l / w_c
matters.
"""

from dataclasses import dataclass
from math import isfinite

import numpy as np

from strop.serve.base import Context, Endpoints, Request, RoutingPolicy
from strop.serve.routing.load import requests, share


@dataclass(frozen=True)
class CacheLoad(RoutingPolicy):
    """w_c * uncached share of the prompt + w_l * requests as a share of the busiest endpoint's."""

    w_c: float = 1.0
    """Weight of the cache."""
    w_l: float = 1.0
    """Weight of load."""

    def __post_init__(self) -> None:
        check_weights(w_c=self.w_c, w_l=self.w_l)

    def scores(
        self, request: Request, endpoints: Endpoints, context: Context, peer: int | None
    ) -> np.ndarray:
        uncached = 1 - endpoints.hits(request) / max(request.prompt, 1)
        return self.w_c * uncached + self.w_l * share(requests(endpoints, context.local))


def check_weights(**weights: float) -> None:
    """Raise ValueError unless weights are finite, none is negative and one is positive."""
    if not all(isfinite(w) and w >= 0 for w in weights.values()) or not any(weights.values()):
        said = ", ".join(f"{name}={w}" for name, w in weights.items())
        raise ValueError(f"weights must be finite and at least 0, and one above 0, got {said}")
