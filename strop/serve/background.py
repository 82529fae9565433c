"""Traffic of others: the share of each tier that is not to be had, by pod and time.

Shares are constant between times that a traffic names itself, so that a simulation recomputes when something
changes and at no other time, and reads of the past, as of telemetry, see what was. Inside a host (tier 0)
there is no other traffic.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from strop.core.errors import StropError, quoted
from strop.core.method import Method
from strop.serve.base import TIERS
from strop.serve.topology import require_amount, require_count

MOST = 0.95
"""Largest share: something is always left."""
SHORTEST = 1e-3
"""Seconds of a step: shorter ones take the time of a simulation and change nothing in it."""
BLOCK = 1024
"""Steps of a walk that are drawn at once."""
KEPT = 2
"""Blocks of a walk in memory."""
MOST_STEPS = 2e8
"""Steps of all pods that are drawn for a simulation at most."""
Traffic = Callable[[float], tuple[np.ndarray, float]]
"""From a time to the shares `[4, pods]` that hold then, not to be changed, and the time when they end."""


class Background(Method, ABC):
    """How others' traffic behaves."""

    @abstractmethod
    def traffic(self, pods: int) -> Traffic:
        """The traffic in a network of some pods: the same at every call."""

    def require_span(self, seconds: float, pods: int) -> None:
        """Raise StropError where so long a time takes more steps than can be drawn."""


@dataclass(frozen=True)
class Constant(Background):
    """The same share of every tier at any time."""

    share: float = 0.2

    def __post_init__(self) -> None:
        _require_share("share", self.share)

    def traffic(self, pods: int) -> Traffic:
        shares = np.full((len(TIERS), pods), float(self.share))
        shares[0] = 0
        shares.flags.writeable = False
        return lambda time: (shares, np.inf)


@dataclass(frozen=True)
class RandomWalk(Background):
    """A walk for each tier and pod, reflected at both ends; in the long run every share is as likely."""

    low: float = 0.0
    high: float = 0.4
    step: float = 0.02
    """Standard deviation of a step."""
    period: float = 0.25
    """Seconds of a step."""
    seed: int = 0

    def __post_init__(self) -> None:
        _require_share("low", self.low)
        _require_share("high", self.high)
        if not self.low < self.high:
            raise StropError(f"low must be below high, got {self.low} and {self.high}")
        require_amount("step", self.step)
        require_seconds("period", self.period)

    def require_span(self, seconds: float, pods: int) -> None:
        steps = seconds / self.period * pods
        if steps > MOST_STEPS:
            raise StropError(
                f"others' traffic takes {steps:.3g} steps in {seconds:.3g} s, over the {MOST_STEPS:.0e} that "
                "are drawn: raise its period, or --rate, or take a shorter trace"
            )

    def traffic(self, pods: int) -> Traffic:
        return _Walk(self, pods)


class _Walk:
    """The steps of a walk drawn so far. Its noise is keyed by tier and pod, and so is where it begins."""

    def __init__(self, walk: RandomWalk, pods: int) -> None:
        self.walk, self.pods = walk, pods
        self._begin()

    def _begin(self) -> None:
        """Stand before the first block."""
        walk = self.walk
        keys = [(walk.seed, tier, pod) for tier in range(1, len(TIERS)) for pod in range(self.pods)]
        self._noise = [np.random.default_rng(key) for key in keys]
        self._at = np.array([noise.uniform(0, walk.high - walk.low) for noise in self._noise])
        self._kept = deque[np.ndarray](maxlen=KEPT)
        self._drawn = 0

    def __call__(self, time: float) -> tuple[np.ndarray, float]:
        """What is older than the blocks kept is drawn again from the start."""
        step, until = period_of(time, self.walk.period)
        block = step // BLOCK
        if block < self._drawn - len(self._kept):
            self._begin()
        while block >= self._drawn:
            self._draw()
        return self._kept[block - self._drawn][step % BLOCK], until

    def _draw(self) -> None:
        steps = np.stack([noise.normal(0, self.walk.step, BLOCK) for noise in self._noise], 1)
        free = self._at + np.cumsum(steps, 0)
        self._at = free[-1]
        width = self.walk.high - self.walk.low
        folded = self.walk.low + width - abs(free % (2 * width) - width)
        shares = np.zeros((BLOCK, len(TIERS), self.pods))
        shares[:, 1:] = folded.reshape(BLOCK, len(TIERS) - 1, -1)
        shares.flags.writeable = False
        self._kept.append(shares)
        self._drawn += 1


@dataclass(frozen=True)
class Windows(Background):
    """One pod after another is crowded for a while, on one tier; otherwise it is as `base` says."""

    share: float = 0.8
    tier: int = 3
    length: float = 60.0
    """Seconds that a pod is crowded."""
    every: float = 120.0
    """Seconds from the beginning of a window to that of the next pod's."""
    base: Background = field(default_factory=Constant)

    def __post_init__(self) -> None:
        _require_share("share", self.share)
        require_seconds("length", self.length)
        require_seconds("every", self.every)
        require_count("tier", self.tier)
        if self.tier >= len(TIERS):
            raise StropError(f"tier must be from 1 to {len(TIERS) - 1}, got {self.tier}")
        if self.length > self.every:
            raise StropError(f"length must be at most every, got {self.length} and {self.every}")

    def require_span(self, seconds: float, pods: int) -> None:
        self.base.require_span(seconds, pods)

    def traffic(self, pods: int) -> Traffic:
        base = self.base.traffic(pods)

        def shares(time: float) -> tuple[np.ndarray, float]:
            now, until = base(time)
            window, end = period_of(time, self.every)
            closes = end - self.every + self.length
            if time >= closes:
                return now, min(until, end)
            crowded = now.copy()
            at = self.tier, window % pods
            crowded[at] = max(crowded[at], self.share)
            crowded.flags.writeable = False
            return crowded, min(until, closes)

        return shares


def period_of(time: float, length: float) -> tuple[int, float]:
    """Which period of a length a time is in, from 0, and when the next begins: always later than `time`."""
    number = int(time // length)
    while (number + 1) * length <= time:
        number += 1
    return number, (number + 1) * length


def require_seconds(name: str, value: float) -> None:
    """Raise StropError unless a time between two changes is at least `SHORTEST`."""
    require_amount(name, value)
    if value < SHORTEST:
        raise StropError(f"{name} must be at least {SHORTEST} seconds, got {value}")


def _require_share(name: str, value: float) -> None:
    require_amount(name, value, zero=True)
    if value > MOST:
        raise StropError(f"{name} must be from 0 to {MOST}, got {quoted(value)}")
