"""The less loaded of two endpoints drawn at random (Mitzenmacher, 2001).

Hardly worse than the least loaded of all, and a stale report sends no crowd to one endpoint.
"""

from dataclasses import dataclass

import numpy as np

from strop.serve.base import Context, Endpoints, Request, RoutingPolicy
from strop.serve.routing.load import requests


@dataclass(frozen=True)
class PowerOfTwo(RoutingPolicy):
    """Requests of two different endpoints with room, infinite for all others."""

    def scores(
        self, request: Request, endpoints: Endpoints, context: Context, peer: int | None
    ) -> np.ndarray:
        fits = np.flatnonzero(endpoints.room(request))
        first = context.rng.integers(len(fits))
        second = (first + 1 + context.rng.integers(max(len(fits) - 1, 1))) % len(fits)
        drawn = fits[[first, second]]
        scores = np.full(len(endpoints), np.inf)
        scores[drawn] = requests(endpoints, context.local)[drawn]
        return scores
