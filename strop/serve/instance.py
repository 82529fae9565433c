"""What instances share: a request on its way, and the columns by which a router sees its endpoints."""

import dataclasses
from dataclasses import dataclass, field
from math import nan

import numpy as np

from strop.core.blocks import PrefixIndex
from strop.serve.base import Endpoints, Job
from strop.serve.latency import Run

ANSWER = 500.0
"""Tokens that an answer is taken to have before any has ended."""
RECENT = 0.05
"""Weight of the newest answer in what an answer has."""


@dataclass(slots=True, eq=False)
class Flight:
    """A request on its way through the fleet; times in seconds, not a number until they come."""

    job: Job
    arrived: float
    begun: float = nan
    """Its prompt is being computed."""
    computed: float = nan
    room: float = nan
    """Memory was found where it decodes, and its KV sets out."""
    moved: float = nan
    first: float = nan
    """The first token, at the end of its first iteration."""
    ended: float = nan
    runs: list[Run] = field(default_factory=list)
    """Pieces of its prompt that are to be computed."""
    prefill: int = -1
    decode: int = -1
    """Numbers of the instances, each within its role; where roles are lent in the fleet, prefill first."""
    tier: int = -1
    reused: int = 0
    """Prompt tokens that were not computed, since they were cached."""
    hit: int = 0
    """Prompt tokens that were not sent, since they were there."""
    recomputed: float = 0.0
    """Seconds that computing the rest took."""
    before: "Flight | None" = field(default=None, repr=False)
    """The turn of its session that came before."""
    since: float = nan
    """When the first turn of its session arrived."""
    kept: bool = False
    """Whether its KV was pinned where it came."""


class Pool:
    """The endpoints of one role as a router sees them.

    Instances write into `live`. Where reports are made now and then, a router sees the last one; which blocks
    are cached it hears at once in any case, as engines send that by themselves.
    """

    def __init__(self, nodes: np.ndarray, capacity: np.ndarray, block: int, reports: bool) -> None:
        """`reports`: whether routers see what `report` took last, and not what is."""
        self.index = PrefixIndex(len(nodes))
        self.reports = reports
        self.until = np.zeros(len(nodes))
        """When what each is doing ends; past for nothing."""
        self.ahead = np.zeros(len(nodes))
        """Seconds of work that waits behind it."""
        self.answer, self._answers = ANSWER, 0
        """Tokens of an answer of late, the same for all instances, that none looks better for being new."""
        self.live = Endpoints(
            node=nodes,
            capacity=capacity,
            free=capacity.copy(),
            running=np.zeros(len(nodes), dtype=np.int64),
            waiting=np.zeros(len(nodes), dtype=np.int64),
            queued=np.zeros(len(nodes), dtype=np.int64),
            wait=np.zeros(len(nodes)),
            step=np.zeros(len(nodes)),
            hits=lambda request: self.index.hits(request.blocks) * block,
        )
        self.sent = np.zeros(len(nodes), dtype=np.int64)
        """Requests sent to each since the report of it."""
        self.report(0.0)

    def __len__(self) -> int:
        return len(self.until)

    def hear(self, output: int) -> None:
        """Learn how many tokens an answer had that has ended."""
        self._answers += 1
        self.answer += max(RECENT, 1 / self._answers) * (output - self.answer)

    def seen(self, now: float) -> Endpoints:
        """What a router knows now."""
        if not self.reports:
            self.report(now)
        self._seen.age = now - self._taken
        return self._seen

    def report(self, now: float) -> None:
        """Let routers know what is now."""
        np.maximum(self.until - now, 0, out=self.live.wait)
        self.live.wait += self.ahead
        self.sent[:] = 0
        self._taken, self._seen = now, self._copied() if self.reports else self.live

    def _copied(self) -> Endpoints:
        held = {f.name: getattr(self.live, f.name) for f in dataclasses.fields(Endpoints)}
        return Endpoints(**{k: v.copy() if isinstance(v, np.ndarray) else v for k, v in held.items()})
