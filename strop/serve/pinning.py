"""Continuum (arXiv 2511.02230): a request's KV stays while its tool runs, as long as that is likely to pay.

The time to live tau maximises P(tool ends within tau) * benefit - cost(tau). P is what was observed of the
tool, and exponential before enough was.

Ours, since the published summaries give no units: the cost of tau seconds is tau times the share of the store
that the KV takes, so that benefit and cost are both seconds of the whole instance. Left out: priority of
requests whose KV is pinned, and first come, first served by program, which are the queue's. What a simulated
instance (`strop.serve.mixed`) names as the benefit is prefill alone, not the queueing that a hit saves.
"""

import math
from collections import defaultdict, deque

import numpy as np

from strop.core.errors import StropError

ENOUGH, MOST = 16, 1024
"""Runs of a tool from which on they stand for themselves, and how many are kept."""


class ContinuumTTL:
    """How long tools run, as observed, and how long KV is kept for them."""

    def __init__(self, prior_s: float = 1.0) -> None:
        """`prior_s`: mean seconds of a tool that is not known yet."""
        if not 0 < prior_s < math.inf:
            raise StropError(f"a tool takes a number of seconds above 0, not {prior_s}")
        self.prior_s = prior_s
        self._seen: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=MOST))

    def observe(self, seconds: float, tool: str = "") -> None:
        """A run of a tool took so long."""
        self._seen[tool].append(seconds)

    def ttl(self, benefit_s: float, share: float, tool: str = "") -> float:
        """Seconds to keep the KV; 0 where keeping it does not pay.

        `benefit_s`: seconds of prefill and of queueing that it saves if the tool ends in time. `share`: of
        the store that it takes, above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise StropError(f"KV takes a share of the store above 0 and at most 1, not {share}")
        seen = self._seen[tool]
        if len(seen) < ENOUGH:
            mean = (self.prior_s + sum(seen)) / (1 + len(seen))
            return mean * math.log(benefit_s / (share * mean)) if benefit_s > share * mean else 0.0
        ends = np.sort(seen)
        gain = benefit_s * np.arange(1, len(ends) + 1) / len(ends) - share * ends
        best = int(gain.argmax())
        return float(ends[best]) if gain[best] > 0 else 0.0
