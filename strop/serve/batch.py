"""A batch of requests that decode, taken forward in closed form: by changes, not by tokens."""

import math
from heapq import heappop, heappush
from typing import Any

from strop.serve.latency import Latency


class Batch:
    """Requests that decode together. Between changes n iterations are one sum; iterations end at `time`.

    Every iteration gives each request one token, which the next ones read as well.
    """

    def __init__(self, latency: Latency) -> None:
        self.latency = latency
        self.size = 0
        self.held = 0
        """Tokens of KV that an iteration reads."""
        self.iteration = 0
        """Iterations so far."""
        self.time = 0.0
        """When the last of them ended."""
        self.spans: list[tuple[int, float, float, int]] = []
        """Iterations in a row, seconds of the first and of the last, requests."""
        self._ends: list[tuple[int, int, int, Any]] = []
        self._fixed, self.token = latency.decode(0)
        """Seconds of an iteration, and what each held token adds."""
        self._joined = 0

    def __len__(self) -> int:
        return self.size

    def step(self) -> float:
        """Seconds of the next iteration."""
        return self._fixed + self.token * self.held

    def seconds(self, n: int) -> float:
        """Seconds of the next n iterations."""
        return n * (self._fixed + self.token * (self.held + self.size * (n - 1) / 2))

    def join(self, what: Any, held: int, left: int) -> None:
        """Take in a request that holds so many tokens and has so many to give, between two iterations."""
        self._joined += 1
        heappush(self._ends, (self.iteration + left, self._joined, held + left, what))
        self._resize(1, held)

    def start(self, now: float) -> None:
        """Begin after a rest."""
        self.time = now

    def until_end(self) -> int:
        """Iterations until a request has given all of its tokens."""
        return self._ends[0][0] - self.iteration

    def done_by(self, now: float) -> int:
        """Whole iterations that fit before `now`."""
        gone = now - self.time
        fixed, growth = self.step(), self.token * self.size / 2
        if growth:
            line = fixed - growth
            n = int((math.sqrt(line * line + 4 * growth * gone) - line) / (2 * growth))
        else:
            n = int(gone / fixed)
        while n and self.time + self.seconds(n) > now:
            n -= 1
        while self.time + self.seconds(n + 1) <= now:
            n += 1
        return n

    def advance(self, n: int, extra: float = 0.0) -> None:
        """Make n iterations, the first longer by `extra` seconds; no request may end before the last."""
        if not n:
            return
        first = self.step() + extra
        self.time += self.seconds(n) + extra
        self.iteration += n
        self.held += n * self.size
        if self.size:
            self.spans.append((n, first, first + self.token * self.size * (n - 1), self.size))

    def leave(self) -> list[Any]:
        """Take out the requests that have given all of their tokens."""
        gone = []
        while self._ends and self._ends[0][0] <= self.iteration:
            _, _, held, what = heappop(self._ends)
            gone.append(what)
            self._resize(-1, -held)
        return gone

    def _resize(self, requests: int, held: int) -> None:
        self.size += requests
        self.held += held
        self._fixed, self.token = self.latency.decode(self.size)
