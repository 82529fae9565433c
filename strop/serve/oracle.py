"""What routers are told of the network: its tiers, and how busy others keep them, as of some time ago.

arXiv 2606.03910 has such an oracle between operator and scheduler, refreshed every 0.1 to 60 s; what exactly
it holds was not to be had, so its fields are ours.
"""

import numpy as np

from strop.core.errors import StropError
from strop.serve.background import MOST, Traffic, period_of, require_seconds
from strop.serve.base import TIERS
from strop.serve.topology import Topology, require_amount

NONE = np.zeros(len(TIERS))
NONE.flags.writeable = False


class Static:
    """A `NetworkOracle` that knows the tiers, and nothing of what happens on them."""

    def __init__(self, topology: Topology) -> None:
        self.bandwidth, self.latency = topology.tier_bandwidth, topology.tier_latency
        self._topology = topology
        self._tiers: dict[int, np.ndarray] = {}
        self._ways: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def tier(self, peer: int, node: np.ndarray) -> np.ndarray:
        """Tier between a host and others `[E]`."""
        row = self._tiers.get(peer)
        if row is None:
            row = self._tiers[peer] = self._topology.tier(peer, np.arange(self._topology.hosts))
        return row[node]

    def way(self, peer: int, node: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes a second of a flow alone from a host to others `[E]`, and seconds until its first byte."""
        rows = self._ways.get(peer)
        if rows is None:
            rows = self._ways[peer] = self._topology.way(peer, np.arange(self._topology.hosts))
        return rows[0][node], rows[1][node]

    def congestion(self, now: float) -> np.ndarray:
        """Share of each tier that others take `[4]`, not to be changed: here 0."""
        return NONE


class Telemetry(Static):
    """Others' share of each tier, the mean of all pods, measured at 0 and every `refresh` seconds since.

    `measured_at` is when the last measurement that was looked at was made.
    """

    def __init__(
        self, topology: Topology, traffic: Traffic, refresh: float = 1.0, max_age: float = 120.0
    ) -> None:
        """`traffic` is what is measured, as of `Network.traffic`, and is believed for `max_age` seconds."""
        super().__init__(topology)
        require_seconds("refresh", refresh)
        require_amount("max_age", max_age)
        self.refresh, self.max_age = refresh, max_age
        self._traffic = traffic
        self._measure(0.0)

    def _measure(self, now: float) -> None:
        number, self._next = period_of(now, self.refresh)
        self.measured_at = number * self.refresh
        self._shares = NONE
        if now - self.measured_at <= self.max_age:
            self._shares = np.minimum(self._traffic(self.measured_at)[0].mean(1), MOST)
            self._shares.flags.writeable = False

    def congestion(self, now: float) -> np.ndarray:
        """Share of each tier that others take `[4]`, not to be changed, as last measured."""
        if now >= self._next:
            self._measure(now)
        return self._shares if now - self.measured_at <= self.max_age else NONE


class Measured(Static):
    """The share that transfers were seen not to get, from an exponentially weighted mean of their throughput.

    What the router's own flows take from one another is in it too.
    """

    def __init__(self, topology: Topology, weight: float = 0.1, max_age: float = 120.0) -> None:
        """`weight` is that of the newest transfer, which is believed for `max_age` seconds."""
        super().__init__(topology)
        require_amount("weight", weight)
        require_amount("max_age", max_age)
        if weight > 1:
            raise StropError(f"weight must be above 0 and at most 1, got {weight}")
        self.weight, self.max_age = weight, max_age
        self.measured_at = np.full(len(TIERS), -np.inf)
        self._got = np.zeros(len(TIERS))
        """Share of the bandwidth."""

    def observe(self, peer: int, node: int, nbytes: float, seconds: float, now: float) -> None:
        """Learn from a transfer that ended `now` and took some seconds, latency included."""
        tier = int(self.tier(peer, np.int64(node)))
        bandwidth, latency = self.way(peer, np.int64(node))
        seconds -= float(latency)
        if nbytes <= 0 or seconds <= 0:
            return
        got, fresh = nbytes / seconds / float(bandwidth), now - self.measured_at[tier] <= self.max_age
        weight = self.weight if fresh else 1.0
        self._got[tier] += weight * (got - self._got[tier])
        self.measured_at[tier] = now

    def congestion(self, now: float) -> np.ndarray:
        """Share of each tier that was not to be had `[4]`, as last measured."""
        shares = np.clip(1 - self._got, 0, MOST)
        return np.where(now - self.measured_at <= self.max_age, shares, 0.0)
