"""NetKV: the endpoint where the first token comes soonest, by seconds to bring the KV, to wait and to decode.

arXiv 2606.03910: C(r, d) = T_xfer + T_queue + T_dec, in the three steps of its ablation: tiers only, with the
transfers that this router has under way, with telemetry. The terms are the paper's, but their exact form is
not at hand, so the formulas are reconstructed. Differs: gamma scales what a transfer under way costs, since
links that share bandwidth only above several flows charge for it twice; load includes what the router has
sent since the last report (`strop.serve.routing.load`); an endpoint has room where the prompt fits, and
nothing is kept free for an answer, whose length no router knows.
"""

from dataclasses import dataclass
from math import isfinite

import numpy as np

from strop.serve.base import TIERS, Context, Endpoints, Request, RoutingPolicy
from strop.serve.routing.load import wait


@dataclass(frozen=True)
class NetKVStatic(RoutingPolicy):
    """Tiers only: each as fast as when nobody else is there."""

    hits: bool = True
    """Whether endpoints take only what they lack of the prompt. Some engines always take all of it."""

    def scores(
        self, request: Request, endpoints: Endpoints, context: Context, peer: int | None
    ) -> np.ndarray:
        t_queue, t_dec = wait(endpoints, context.local), endpoints.step
        if peer is None:
            return t_queue + t_dec
        return self.transfer(request, endpoints, context, peer) + t_queue + t_dec

    def ties(self, endpoints: Endpoints, context: Context, peer: int | None) -> tuple[np.ndarray, ...]:
        """The nearer tier, then the requests there."""
        fewer = super().ties(endpoints, context, peer)
        return fewer if peer is None else (context.oracle.tier(peer, endpoints.node), *fewer)

    def transfer(self, request: Request, endpoints: Endpoints, context: Context, peer: int) -> np.ndarray:
        """T_xfer: seconds `[E]` until the KV of a request is there, s_eff * slowdown / B + L."""
        oracle = context.oracle
        hit = endpoints.hits(request) if self.hits else np.zeros(len(endpoints))
        s_eff = context.kv_bytes * np.maximum(request.prompt - hit, 0)
        bandwidth, latency = oracle.way(peer, endpoints.node)
        slowdown = self.slowdown(context, peer)[oracle.tier(peer, endpoints.node)]
        return s_eff * (slowdown / bandwidth) + latency

    def slowdown(self, context: Context, peer: int) -> np.ndarray:
        """How many times as long a byte takes on each tier as on an empty one, `[4]`."""
        return np.ones(len(TIERS))


@dataclass(frozen=True)
class NetKVSelf(NetKVStatic):
    """With self-contention: transfers of this router from the same host over the same tier share it."""

    gamma: float = 1.0
    """What a transfer under way costs the next one: 1 where they share evenly, 0 where they do not meet."""

    def __post_init__(self) -> None:
        if not (isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"gamma must be finite and at least 0, got {self.gamma}")

    def slowdown(self, context: Context, peer: int) -> np.ndarray:
        flows = context.local.flows
        n_in = np.array([flows.get((peer, tier), 0) for tier in range(len(TIERS))])
        return 1 + self.gamma * n_in


@dataclass(frozen=True)
class NetKV(NetKVSelf):
    """With telemetry: others take a share c of each tier, as last measured."""

    def slowdown(self, context: Context, peer: int) -> np.ndarray:
        return super().slowdown(context, peer) / (1 - context.oracle.congestion(context.now))
