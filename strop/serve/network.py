"""Transfers as flows that share links, not as packets.

Every flow has its max-min fair rate under the limit of its tier; rates change when a flow begins or ends, or
others' traffic changes, and at no other time. How flows share in the flow mode of arXiv 2606.03910 was not to
be had, so this is ours. Left out: slow start, loss, queues in switches.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from strop.kernels import maxmin
from strop.serve.background import Background, Constant
from strop.serve.events import Clock
from strop.serve.topology import LINKS, Topology

ROOM = 64
"""Flows and routes that arrays have room for at first; they double when full."""


class Flow(NamedTuple):
    """A transfer under way."""

    route: int
    latency: float
    nbytes: float
    call: Callable[..., None]
    args: tuple[Any, ...]


class Transfers(ABC):
    """Sends bytes between hosts: what all ways to share have in common.

    Routes are numbered as they are first used: `_paths` `[R, LINKS]` are their links, `_alone` `[R]` bytes a
    second of a flow that nobody is in the way of, `_ends` `[R, 2]` the places of both ends in `_free`
    `[4 * pods]`, the share that others leave of a tier in a pod, and `_limits` `[R]` what the less of the two
    leaves of `_alone`, kept up for routes with flows.
    """

    def __init__(self, topology: Topology, clock: Clock, background: Background | None = None) -> None:
        """`background` is others' traffic, none unless given."""
        self.topology, self.clock = topology, clock
        self.traffic = (background or Constant(0.0)).traffic(topology.pods)
        """What telemetry measures."""
        self.asked = self.ended = 0.0
        """Bytes of all flows, and of those whose last byte has left."""
        self._routes: dict[tuple[int, int], tuple[int, float, int, int]] = {}
        self._paths = np.full((ROOM, LINKS), -1, np.int32)
        self._ends = np.zeros((ROOM, 2), np.int64)
        self._alone, self._limits = np.zeros(ROOM), np.zeros(ROOM)
        self._links, places = topology.links()
        self._link_places = places @ [topology.pods, 1]
        self._listen()

    def send(self, source: int, target: int, nbytes: float, call: Callable[..., None], *args: Any) -> None:
        """Send from a host to another, and call when the last byte is there, or the word that there is none.

        Raises StropError where there is no such host.
        """
        if self.clock.now >= self._until:
            self._listen()
        number, latency, one, other = self._routes.get((source, target)) or self._route(source, target)
        if nbytes > 0:
            self.asked += nbytes
            self._limits[number] = self._alone[number] * min(self._free[one], self._free[other])
            self._begin(Flow(number, latency, nbytes, call, args))
        elif nbytes == 0:
            self.clock.at(self.clock.now + latency, call, *args)
        else:
            raise ValueError(f"asked to send {nbytes} bytes")

    @abstractmethod
    def _begin(self, flow: Flow) -> None:
        """Take on a flow of some bytes, and call `_end` when its last has left."""

    @abstractmethod
    def __len__(self) -> int:
        """Flows under way."""

    def _end(self, flow: Flow) -> None:
        self.ended += flow.nbytes
        self.clock.at(self.clock.now + flow.latency, flow.call, *flow.args)

    def _listen(self) -> None:
        """Learn what others leave from now until `_until`."""
        congestion, self._until = self.traffic(self.clock.now)
        self._free = 1 - congestion.ravel()
        self._capacity = self._links * self._free[self._link_places]

    def _route(self, source: int, target: int) -> tuple[int, float, int, int]:
        """Number, latency and ends of a route that is new."""
        topology, number = self.topology, len(self._routes)
        path, tier = topology.path(source, target), int(topology.tier(source, target))
        if number == len(self._paths):
            self._paths = np.concatenate([self._paths, np.full_like(self._paths, -1)])
            for name in ("_ends", "_alone", "_limits"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        one, other = (tier * topology.pods + topology.pod(host) for host in (source, target))
        self._paths[number, : len(path)] = path
        self._ends[number] = one, other
        self._alone[number], latency = map(float, topology.way(source, target))
        self._routes[source, target] = number, latency, one, other
        return self._routes[source, target]


class Network(Transfers):
    """Max-min fair shares, computed anew at every event.

    The clock holds one end that counts, the soonest; those that it was told before carry an older version.
    """

    def __init__(self, topology: Topology, clock: Clock, background: Background | None = None) -> None:
        self._advance = maxmin.kernels().advance
        self._flows: list[Flow] = []
        self._route_of, self._places = np.zeros(ROOM, np.int64), np.zeros(ROOM, np.int64)
        self._left, self._rates = np.zeros(ROOM), np.zeros(ROOM)
        self._moved = self._last = self._soonest = 0.0
        self._version = 0
        self._waits = False
        """Whether the clock holds the next change of others' traffic."""
        super().__init__(topology, clock, background)

    def __len__(self) -> int:
        return len(self._flows)

    def _begin(self, flow: Flow) -> None:
        count = len(self._flows)
        if count == len(self._left):
            for name in ("_route_of", "_places", "_left", "_rates"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        self._route_of[count], self._left[count], self._rates[count] = flow.route, flow.nbytes, 0.0
        self._flows.append(flow)
        self._run(self.clock.now - self._last)

    def _run(self, seconds: float) -> None:
        """Let flows run for the time since the last event as they did, and share anew from now on."""
        clock, count = self.clock, len(self._flows)
        stay, self._soonest, moved = self._advance(
            self._paths,
            self._limits,
            self._capacity,
            self._route_of,
            self._left,
            self._rates,
            self._places,
            count,
            float(seconds),
        )
        self._last = clock.now
        self._moved += moved
        self._version += 1
        if stay < count:
            gone = self._places[: count - stay].tolist()
            for place in gone:
                self._end(self._flows[place])
            for place in reversed(gone):
                del self._flows[place]
        if stay:
            clock.at(clock.now + self._soonest, self._soonest_ends, self._version)
            if not self._waits and self._until < np.inf:
                self._waits = True
                clock.at(self._until, self._traffic_changes)

    def _listen(self) -> None:
        super()._listen()
        routes = self._route_of[: len(self._flows)]
        self._limits[routes] = self._alone[routes] * self._free[self._ends[routes]].min(1)

    def _soonest_ends(self, version: int) -> None:
        if version == self._version:
            self._run(self._soonest)

    def _traffic_changes(self) -> None:
        """Runs only while there are flows, so that a simulation comes to its end."""
        self._waits = False
        if self._flows:
            if self.clock.now >= self._until:
                self._listen()
            self._run(self.clock.now - self._last)

    def check(self) -> None:
        """Raise AssertionError unless no byte is lost and all flows and links keep their limits."""
        count = len(self._flows)
        left, rates, routes = self._left[:count], self._rates[:count], self._route_of[:count]
        waiting = sum(flow.nbytes for flow in self._flows)
        assert abs(self.asked - self.ended - waiting) <= 1e-9 * self.asked, "flows were lost"
        assert abs(self.asked - self._moved - left.sum()) <= 1e-9 * self.asked, "bytes were lost"
        assert (rates <= self._limits[routes] * (1 + 1e-9)).all(), "a flow is above its limit"
        links = self._paths[routes].ravel()
        load = np.bincount(links[links >= 0], np.repeat(rates, LINKS)[links >= 0], len(self._capacity))
        assert (load <= self._capacity * (1 + 1e-9)).all(), "a link is above its capacity"


class FrozenNetwork(Transfers):
    """For comparison: a flow keeps the share that it finds when it begins, an equal one of its fullest link.

    Who came first keeps what is no longer fair, links may carry more than they can, and nobody gets what is
    freed.
    """

    def __init__(self, topology: Topology, clock: Clock, background: Background | None = None) -> None:
        super().__init__(topology, clock, background)
        self._load = [0] * len(self._capacity)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def _begin(self, flow: Flow) -> None:
        links = [link for link in self._paths[flow.route].tolist() if link >= 0]
        share = float(self._limits[flow.route])
        for link in links:
            self._load[link] += 1
            share = min(share, float(self._capacity[link]) / self._load[link])
        self._count += 1
        self.clock.at(self.clock.now + flow.nbytes / share, self._ends_as_told, flow, links)

    def _ends_as_told(self, flow: Flow, links: list[int]) -> None:
        for link in links:
            self._load[link] -= 1
        self._count -= 1
        self._end(flow)
