"""Splitwise (arXiv 2311.18677): pools that lend instances to each other, or else the fewest tokens pending.

Where instances prefill or decode, no scores can say this: a simulation places both phases of a request when
it comes, as `strop.serve.lending` says. Where all do both, this is the choice that Splitwise falls back on.
"""

from dataclasses import dataclass

import numpy as np

from strop.serve.base import Context, Endpoints, Request, RoutingPolicy
from strop.serve.routing.load import requests


@dataclass(frozen=True)
class Splitwise(RoutingPolicy):
    """Prompt tokens that wait, and one for each request."""

    pending: float = 8192.0
    """Prompt tokens that may be pending where a prompt joins a queue, its own included."""

    def __post_init__(self) -> None:
        if not self.pending >= 0:
            raise ValueError(f"pending must be at least 0, got {self.pending}")

    def scores(
        self, request: Request, endpoints: Endpoints, context: Context, peer: int | None
    ) -> np.ndarray:
        return endpoints.queued + requests(endpoints, context.local)
