"""Join the shortest queue: the endpoint where a request would begin soonest (arXiv 2606.03770)."""

from dataclasses import dataclass

import numpy as np

from strop.serve.base import Context, Endpoints, Request, RoutingPolicy
from strop.serve.routing.load import wait


@dataclass(frozen=True)
class JSQ(RoutingPolicy):
    """Seconds of expected waiting."""

    def ties(self, endpoints: Endpoints, context: Context, peer: int | None) -> tuple[np.ndarray, ...]:
        """The requests there, then chance: two routers that take turns would go in step."""
        return (*super().ties(endpoints, context, peer), context.rng.random(len(endpoints)))

    def scores(
        self, request: Request, endpoints: Endpoints, context: Context, peer: int | None
    ) -> np.ndarray:
        return wait(endpoints, context.local)

    def room(self, request: Request, endpoints: Endpoints) -> np.ndarray:
        """A full endpoint that has a queue is judged by its queue, so that all queues take equally long."""
        fits = (endpoints.free >= request.prompt) | (endpoints.wait > 0)
        return fits if fits.any() else endpoints.room(request)
