"""What the parts of a fleet tell one another: requests, endpoints, routing, eviction, chunks, the network.

Times are seconds and sizes bytes or tokens. Endpoints of one role are columns of arrays `[E]`, not objects,
so that a policy is a formula over all of them, and its cost hardly grows with the fleet.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from strop.core.method import Method

TIERS = ("node", "rack", "pod", "core")
"""What two endpoints share, from near to far; a tier is an index into it."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a router may know of a request. How long its answer gets is not part of it."""

    id: int
    prompt: int
    """Tokens."""
    blocks: tuple[int, ...] = ()
    """Chained hash of each block of the prompt, the last one perhaps partly filled; empty where unknown."""
    session: int = -1
    """Conversation or program that it belongs to; -1 for none."""
    tool_call: bool = False
    """Whether its answer ends in a call of a tool, whose result the next request brings."""


@dataclass(slots=True)
class Job:
    """A request as the simulator knows it."""

    request: Request
    output: int
    """Tokens that it generates, at least 1."""
    arrival: float = 0.0
    """Ignored where another job leads to this one."""
    next: "Job | None" = None
    """The next turn of its session."""
    gap: float = 0.0
    """Seconds from the end of this job to the arrival of the next."""


@dataclass(frozen=True)
class Trace:
    """Jobs in order of arrival; later turns of a session hang on the first."""

    name: str
    jobs: list[Job]
    block: int = 512
    """Tokens of a block."""

    @property
    def hashed(self) -> bool:
        """Whether requests say which blocks they share."""
        return any(job.request.blocks for job in self.jobs)

    def __len__(self) -> int:
        """Requests, later turns included."""
        return sum(1 for _ in self.all())

    def all(self) -> "Sequence[Job]":
        """Every job, later turns included."""
        found = []
        for job in self.jobs:
            one: Job | None = job
            while one is not None:
                found.append(one)
                one = one.next
        return found


@dataclass
class Endpoints:
    """The instances of one role as a router sees them, `age` seconds ago; arrays `[E]`."""

    node: np.ndarray
    """Number of the host of each."""
    capacity: np.ndarray
    """Tokens of KV that each can hold."""
    free: np.ndarray
    """Tokens of KV that are neither in use nor promised; cached ones that may go count as free."""
    running: np.ndarray
    """Requests that are being served."""
    waiting: np.ndarray
    """Requests that wait to be served."""
    queued: np.ndarray
    """Prompt tokens that wait."""
    wait: np.ndarray
    """Seconds until a request that comes now would begin."""
    step: np.ndarray
    """Seconds of an iteration with one more request."""
    hits: Callable[[Request], np.ndarray]
    """Tokens `[E]` of a request's prompt that each holds already."""
    age: float = 0.0

    def __len__(self) -> int:
        return len(self.node)

    def room(self, request: Request) -> np.ndarray:
        """Whether each has room for a request's prompt, `[E]`; all where none has."""
        fits = self.free >= request.prompt
        return fits if fits.any() else np.ones(len(fits), dtype=bool)


class NetworkOracle(Protocol):
    """What a router is told of the network; reads memory, never the network."""

    bandwidth: np.ndarray
    """Bytes a second that a flow gets on each tier when nobody else is there, `[4]`."""
    latency: np.ndarray
    """Seconds until its first byte, `[4]`."""

    def tier(self, peer: int, node: np.ndarray) -> np.ndarray:
        """Tier between a host and others `[E]`."""
        ...

    def way(self, peer: int, node: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes a second of a flow alone from a host to others `[E]`, and seconds until its first byte.

        Those of the tier, unless two hosts have a link of their own.
        """
        ...

    def congestion(self, now: float) -> np.ndarray:
        """Share of each tier's bandwidth that others take, `[4]` in [0, 0.95], as last measured.

        All 0 where the last measurement is too old to be believed.
        """
        ...


@dataclass
class LocalState:
    """What a router knows of its own doing, always fresh."""

    picked: int = 0
    """Decisions so far."""
    sent: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Requests sent to each endpoint since the report of it that the router has, `[E]`."""
    flows: dict[tuple[int, int], int] = field(default_factory=dict)
    """Transfers under way, by host that sends and tier."""


@dataclass
class Context:
    """What a decision may rest on beside the request and the endpoints."""

    now: float
    local: LocalState
    oracle: NetworkOracle
    kv_bytes: float
    """Bytes of KV a token."""
    rng: np.random.Generator


class Decision(NamedTuple):
    """An endpoint and why."""

    endpoint: int
    scores: np.ndarray
    """Of all endpoints `[E]`; the lowest is the best, infinite where it may not go."""


class RoutingPolicy(Method, ABC):
    """Which endpoint takes a request: the lowest score of those that have room for its prompt.

    Subclasses are frozen dataclasses and hold no state: what they need to remember is in `Context`.
    """

    needs_hashes: bool = False
    """Whether it says nothing without block hashes."""

    @abstractmethod
    def scores(
        self, request: Request, endpoints: Endpoints, context: Context, peer: int | None
    ) -> np.ndarray:
        """A number `[E]` for each endpoint, lower is better; `peer` is the host that holds the KV.

        Must not change its arguments; may draw from `context.rng`.
        """

    def room(self, request: Request, endpoints: Endpoints) -> np.ndarray:
        """Which endpoints may take a request, `[E]`, at least one."""
        return endpoints.room(request)

    def ties(self, endpoints: Endpoints, context: Context, peer: int | None) -> tuple[np.ndarray, ...]:
        """What decides between equal scores, `[E]` each, the lower the better: the requests there."""
        return (endpoints.running + endpoints.waiting + context.local.sent,)

    def pick(
        self, request: Request, endpoints: Endpoints, context: Context, peer: int | None = None
    ) -> Decision:
        """The best endpoint with room; of all where none has. Ties go by `ties`, then in turn."""
        scores = np.asarray(self.scores(request, endpoints, context, peer), dtype=np.float64)
        room = self.room(request, endpoints)
        if not room.all():
            scores = np.where(room, scores, np.inf)
        best = np.flatnonzero(scores == scores.min())
        if len(best) > 1:
            turn = (best - context.local.picked) % len(endpoints)
            keys = [key[best] for key in self.ties(endpoints, context, peer)]
            best = best[np.lexsort([turn, *reversed(keys)])]
        return Decision(int(best[0]), scores)
