"""A fixed grade for each tier beside load: what routers do today that know the topology and not the bytes.

The curve is that of llm-d's `topology-affinity-scorer`, from the same host to the same region, over the four
tiers here; scores are weighted and added as llm-d adds its scorers'.
"""

from dataclasses import dataclass

import numpy as np

from strop.serve.base import Context, Endpoints, Request, RoutingPolicy
from strop.serve.routing.cache_load import check_weights
from strop.serve.routing.load import requests, share

AFFINITY = np.array([1.00, 0.20, 0.05, 0.02])
"""By tier; 0 where there is no peer."""


@dataclass(frozen=True)
class Topology(RoutingPolicy):
    """w_t * (1 - affinity of the tier) + w_l * requests as a share of the busiest endpoint's."""

    w_t: float = 1.0
    """Weight of the topology."""
    w_l: float = 1.0
    """Weight of load."""

    def __post_init__(self) -> None:
        check_weights(w_t=self.w_t, w_l=self.w_l)

    def scores(
        self, request: Request, endpoints: Endpoints, context: Context, peer: int | None
    ) -> np.ndarray:
        affinity = 0.0 if peer is None else AFFINITY[context.oracle.tier(peer, endpoints.node)]
        return self.w_t * (1 - affinity) + self.w_l * share(requests(endpoints, context.local))
