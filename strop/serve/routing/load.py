"""Load as a router knows it: the last report, and what it has sent since.

A report is `age` seconds old, and what was sent in the meantime is not in it. `LocalState.sent` counts that,
anew with each report, so that the sum has every request of this router once. What it misses are requests
that other routers sent, or that ended, since the report.
"""

import numpy as np

from strop.serve.base import Endpoints, LocalState


def requests(endpoints: Endpoints, local: LocalState) -> np.ndarray:
    """Requests at or on their way to each endpoint, `[E]`."""
    return endpoints.running + endpoints.waiting + local.sent


def share(requests: np.ndarray) -> np.ndarray:
    """Requests as a share of the busiest endpoint's, `[E]` in [0, 1]."""
    return requests / max(requests.max(), 1)


def wait(endpoints: Endpoints, local: LocalState) -> np.ndarray:
    """Seconds until a request that is sent now would begin, `[E]`: an iteration for each sent before it."""
    return endpoints.wait + local.sent * endpoints.step
