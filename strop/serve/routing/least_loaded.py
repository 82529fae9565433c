"""The endpoint with the fewest requests, those on their way included."""

from dataclasses import dataclass

import numpy as np

from strop.serve.base import Context, Endpoints, Request, RoutingPolicy
from strop.serve.routing.load import requests


@dataclass(frozen=True)
class LeastLoaded(RoutingPolicy):
    """Requests."""

    def scores(
        self, request: Request, endpoints: Endpoints, context: Context, peer: int | None
    ) -> np.ndarray:
        return requests(endpoints, context.local)
