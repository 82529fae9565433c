"""One endpoint after another, whatever their load.

The turn goes round those with room: it is the number of decisions so far, modulo theirs.
"""

from dataclasses import dataclass

import numpy as np

from strop.serve.base import Context, Endpoints, Request, RoutingPolicy


@dataclass(frozen=True)
class RoundRobin(RoutingPolicy):
    """Turns until each endpoint is next."""

    def scores(
        self, request: Request, endpoints: Endpoints, context: Context, peer: int | None
    ) -> np.ndarray:
        fits = endpoints.room(request)
        place = np.cumsum(fits) - 1
        return np.where(fits, (place - context.local.picked) % fits.sum(), np.inf)
