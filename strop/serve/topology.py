"""Where hosts are and what lies between them: tiers, and the links that transfers share.

A flow is bounded twice: by what one flow gets on its tier, and by the links on its path, which it shares with
others. The bandwidths of the tiers are those of NetKV's setting (arXiv 2606.03910) as others quote it;
latencies, NICs and links are ours.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from strop.core.errors import StropError, quoted
from strop.core.method import Method

LINKS = 4
"""Most links on a path."""
LEAST, MOST = 1e-9, 1e15
"""Of any amount but 0: with others the sums of a simulation leave what numbers hold."""


class Topology(Method, ABC):
    """Hosts numbered from 0. Each has a NIC: link `host` is its way out, link `hosts + host` its way in."""

    hosts: int
    """How many."""
    pods: int
    """Parts in which others' traffic may differ."""

    @property
    @abstractmethod
    def tier_bandwidth(self) -> np.ndarray:
        """Bytes a second `[4]` that a flow gets on each tier when nobody else is there."""

    @property
    @abstractmethod
    def tier_latency(self) -> np.ndarray:
        """Seconds `[4]` until its first byte."""

    @abstractmethod
    def tier(self, a: int | np.ndarray, b: int | np.ndarray) -> np.ndarray:
        """Tiers between hosts, int64 of the shape that `a` and `b` broadcast to."""

    @abstractmethod
    def pod(self, host: int | np.ndarray) -> int | np.ndarray:
        """The pod of a host, or of each."""

    @abstractmethod
    def links(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes a second `[L]` of each link, and tier and pod `[L, 2]` whose other traffic it carries too.

        NICs carry that of tier 0, which is none.
        """

    def way(self, a: int | np.ndarray, b: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes a second of a flow between hosts when nobody else is there, and seconds until its first byte.

        Of the shape that `a` and `b` broadcast to; here those of their tier.
        """
        tier = self.tier(a, b)
        return self.tier_bandwidth[tier], self.tier_latency[tier]

    def path(self, a: int, b: int) -> tuple[int, ...]:
        """Links from a host to another, `LINKS` at most. Raises StropError where a host does not exist."""
        for host in (a, b):
            if not 0 <= host < self.hosts:
                raise StropError(f"host {host} is not in a network of {self.hosts}, numbered from 0")
        return () if a == b else (a, *self.between(a, b), self.hosts + b)

    def between(self, a: int, b: int) -> tuple[int, ...]:
        """Links beyond the NICs on the way between two hosts."""
        return ()


@dataclass(frozen=True)
class FatTree(Topology):
    """Hosts in racks in pods, `host = (pod * racks + rack) * nodes + node`.

    Racks of a pod meet at its spine, one link; pods meet in the core, to which each has a link up and one
    down. Their capacities follow from as many flows as fill all NICs of a pod at `bandwidth[1]` each (8 at
    the defaults): sent to other racks the spine leaves each `bandwidth[2]`, and sent to other pods the core
    link leaves each `bandwidth[1] / oversubscription`, which at 4:1 is `bandwidth[3]`. With fewer flows the
    tier bounds them, with more they share. Nothing inside a host is shared.
    """

    pods: int = 4
    racks: int = 2
    """A pod."""
    nodes: int = 1
    """Hosts a rack."""
    bandwidth: tuple[float, ...] = (450e9, 12.5e9, 6.25e9, 3.125e9)
    """Bytes a second that one flow gets at most, by tier."""
    latency: tuple[float, ...] = (2e-6, 5e-6, 10e-6, 20e-6)
    """Seconds, by tier."""
    nic: float = 50e9
    """Bytes a second of a host, each way: four flows as fast as a rack lets them be."""
    oversubscription: float = 4.0
    """NICs of a pod over its link to the core."""

    def __post_init__(self) -> None:
        for name in ("pods", "racks", "nodes"):
            require_count(name, getattr(self, name))
        for name in ("bandwidth", "latency"):
            values = getattr(self, name)
            if not isinstance(values, tuple | list) or len(values) != 4:
                raise StropError(f"{name} must be 4 numbers, one a tier, got {quoted(values)}")
            for value in values:
                require_amount(name, value, zero=name == "latency")
        require_amount("nic", self.nic)
        require_amount("oversubscription", self.oversubscription)

    @property
    def hosts(self) -> int:
        return self.pods * self.racks * self.nodes

    @property
    def tier_bandwidth(self) -> np.ndarray:
        return np.array(self.bandwidth)

    @property
    def tier_latency(self) -> np.ndarray:
        return np.array(self.latency)

    def tier(self, a: int | np.ndarray, b: int | np.ndarray) -> np.ndarray:
        racks = np.not_equal(a // self.nodes, b // self.nodes)
        return np.not_equal(a, b).astype(np.int64) + racks + np.not_equal(self.pod(a), self.pod(b))

    def pod(self, host: int | np.ndarray) -> int | np.ndarray:
        return host // (self.nodes * self.racks)

    def between(self, a: int, b: int) -> tuple[int, ...]:
        one, other, first = self.pod(a), self.pod(b), 2 * self.hosts
        if one != other:
            return first + self.pods + one, first + 2 * self.pods + other
        return () if a // self.nodes == b // self.nodes else (first + one,)

    def links(self) -> tuple[np.ndarray, np.ndarray]:
        nics = self.racks * self.nodes * self.nic
        spine, core = nics * self.bandwidth[2] / self.bandwidth[1], nics / self.oversubscription
        counts = [2 * self.hosts, *[self.pods] * 3]
        pods = np.tile(np.arange(self.pods), 3)
        places = np.zeros((sum(counts), 2), np.int64)
        places[counts[0] :] = np.stack([np.repeat([2, 3, 3], self.pods), pods], 1)
        return np.repeat([self.nic, spine, core, core], counts), places


@dataclass(frozen=True)
class Flat(Topology):
    """Hosts at one switch that is never full, as at home or at the edge: tiers 0 and 1, one pod.

    Pairs of hosts may have a link of their own, slower or faster, which all between these two take, each way,
    and nobody else.
    """

    hosts: int = 2
    bandwidth: float = 115e6
    """Bytes a second between two hosts, and of each host's port, each way."""
    rtt: float = 4e-4
    """Seconds there and back."""
    memory: float = 10e9
    """Bytes a second of a copy within a host."""
    pairs: tuple[tuple[float, ...], ...] = ()
    """Links of two hosts alone: both hosts, bytes a second, seconds there and back."""

    def __post_init__(self) -> None:
        require_count("hosts", self.hosts)
        require_amount("bandwidth", self.bandwidth)
        require_amount("rtt", self.rtt, zero=True)
        require_amount("memory", self.memory)
        if not isinstance(self.pairs, tuple | list):
            raise StropError(f"pairs is a list of links, got {quoted(self.pairs)}")
        seen = set()
        for pair in self.pairs:
            known = isinstance(pair, tuple | list) and len(pair) == 4 and all(map(self._has, pair[:2]))
            ends = frozenset(pair[:2]) if known else frozenset()
            if len(ends) != 2 or ends in seen:
                raise StropError(
                    f"each of pairs is two of the {self.hosts} hosts, a bandwidth and an rtt, and is there "
                    f"once, got {quoted(pair)}"
                )
            seen.add(ends)
            require_amount("bandwidth of a pair", pair[2])
            require_amount("rtt of a pair", pair[3], zero=True)

    def _has(self, host: Any) -> bool:
        return isinstance(host, int | float) and host in range(self.hosts)

    @property
    def pods(self) -> int:
        return 1

    @property
    def tier_bandwidth(self) -> np.ndarray:
        return np.array([self.memory, *[self.bandwidth] * 3])

    @property
    def tier_latency(self) -> np.ndarray:
        return np.array([0.0, *[self.rtt / 2] * 3])

    def tier(self, a: int | np.ndarray, b: int | np.ndarray) -> np.ndarray:
        return np.not_equal(a, b).astype(np.int64)

    def pod(self, host: int | np.ndarray) -> int | np.ndarray:
        return host * 0

    def way(self, a: int | np.ndarray, b: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bandwidth, latency = super().way(a, b)
        for one, other, own, rtt in self.pairs:
            theirs = (np.equal(a, one) & np.equal(b, other)) | (np.equal(a, other) & np.equal(b, one))
            bandwidth, latency = np.where(theirs, own, bandwidth), np.where(theirs, rtt / 2, latency)
        return bandwidth, latency

    def path(self, a: int, b: int) -> tuple[int, ...]:
        switched = super().path(a, b)
        for number, pair in enumerate(self.pairs):
            if {a, b} == set(pair[:2]):
                return (2 * (self.hosts + number) + (a > b),)
        return switched

    def links(self) -> tuple[np.ndarray, np.ndarray]:
        capacity = [*[float(self.bandwidth)] * self.hosts, *(float(pair[2]) for pair in self.pairs)]
        return np.repeat(capacity, 2), np.zeros((2 * len(capacity), 2), np.int64)


def require_count(name: str, value: int) -> None:
    """Raise StropError unless a field is a whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise StropError(f"{name} must be a whole number, at least 1, got {quoted(value)}")


def require_amount(name: str, value: float, zero: bool = False) -> None:
    """Raise StropError unless a field is from `LEAST` to `MOST`, or 0 where that is allowed."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (LEAST <= value <= MOST or (zero and value == 0)):
        least = "0 or" if zero else "above 0,"
        raise StropError(f"{name} must be a finite number {least} {LEAST:g} to {MOST:g}, got {quoted(value)}")
