"""What a round of speculation costs: the target's latency by verified tokens and context, and the rest.

The latency curve of every profiled context is non-decreasing and convex in the number of tokens, which makes
a tree's throughput unimodal in its size (CaDDTree, arXiv 2606.01813). Times are in seconds.

Differs: the curve is fitted by non-negative least squares on hinges instead of a quadratic program, with
relative errors, because timing noise grows with what is timed. The root counts as a token that is verified.
"""

import json
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from strop.core.errors import StropError, quoted, reason
from strop.core.files import atomic, digest

Profile = Mapping[int, Mapping[int, float]]
"""Seconds of one target forward: {context: {tokens: seconds}}, contexts and tokens ascending."""

WARM_UPS = 1
LEAST_REPEATS, MOST_REPEATS, SECONDS = 3, 20, 2.0
"""Repeats at a context go on beyond the least until they took so long, or until the most."""
BUCKET = 64
"""Contexts so close together share one curve."""
FAR = 2**20
"""Tokens up to which a curve is continued with its last slope."""
WEIGHT, CLIP = 0.1, 2.0
"""Of recalibration: weight of the newest measurement, and how far from the factor in force it may be."""


@dataclass
class CostModel:
    """Latency curves of the profiled contexts and everything else that a round takes."""

    curves: Profile
    draft_s: float = 0.0
    """C_d: seconds of a round that do not depend on the tree's size, at context 0."""
    draft_slope: float = 0.0
    """What every token of context adds to them."""
    node_s: float = 0.0
    """Seconds that every drafted node takes on the host."""
    factor: float = field(default=1.0, init=False)
    """Measured over profiled latency, as observed lately."""
    draft_factor: float = field(default=1.0, init=False)
    """The same of what does not depend on the tree."""

    def __post_init__(self) -> None:
        """Raise ValueError unless all numbers are times."""
        rest = (self.draft_s, self.draft_slope, self.node_s)
        if not (np.isfinite(rest).all() and min(rest) >= 0):
            raise ValueError("a cost of drafting is not a time")
        if not self.curves or any(len(curve) < 2 for curve in self.curves.values()):
            raise ValueError("a cost model needs a context with two sizes")
        self._contexts = sorted(self.curves)
        self._lines = [_line(self.curves[context]) for context in self._contexts]
        self._recent: tuple[tuple[int, int], list[float]] = ((-1, -1), [])

    @classmethod
    def fit(
        cls, profile: Profile, draft_s: float = 0.0, draft_slope: float = 0.0, node_s: float = 0.0
    ) -> "CostModel":
        """A model whose curves are the nearest convex ones to the measured."""
        curves = {context: convex(profile[context]) for context in sorted(profile)}
        return cls(curves, draft_s, draft_slope, node_s)

    def draft(self, context: int) -> float:
        """C_d: seconds of a round apart from verification and from what grows with the tree."""
        return self.draft_factor * (self.draft_s + self.draft_slope * context)

    def verify(self, tokens: int, context: int) -> float:
        """C_v: seconds to verify `tokens` tokens, the root and its `tokens` - 1 nodes, behind `context`."""
        return self.factor * float(self._forward(tokens, context)) + self.node_s * (tokens - 1)

    def rounds(self, context: int, most: int) -> Iterator[float]:
        """C_d + C_v of rounds with 0, 1, ... `most` nodes, of a context in the same bucket of 64."""
        key = (min(context, self._contexts[-1]) // BUCKET, most)
        if self._recent[0] != key:
            middle = key[0] * BUCKET + BUCKET // 2
            self._recent = key, self._forward(np.arange(1, most + 2), middle).tolist()
        draft, factor, node_s = self.draft(context), self.factor, self.node_s
        return (draft + factor * forward + node_s * n for n, forward in enumerate(self._recent[1]))

    def observe(self, tokens: int, context: int, seconds: float) -> None:
        """Recalibrate by one measured forward; a single stray one cannot do much."""
        self.factor = _toward(seconds / float(self._forward(tokens, context)), self.factor)

    def observe_draft(self, nodes: int, context: int, seconds: float) -> None:
        """Recalibrate by one round apart from its verification."""
        profiled = self.draft_s + self.draft_slope * context
        if profiled > 0:
            ratio = (seconds - self.node_s * nodes) / profiled
            self.draft_factor = _toward(ratio, self.draft_factor)

    def _forward(self, tokens: int | np.ndarray, context: int) -> np.ndarray:
        """Seconds as profiled, between the two neighbouring contexts."""
        above = bisect_left(self._contexts, context)
        if above in (0, len(self._contexts)):
            return np.interp(tokens, *self._lines[min(above, len(self._contexts) - 1)])
        lower, upper = self._contexts[above - 1 : above + 1]
        share = (context - lower) / (upper - lower)
        below = np.interp(tokens, *self._lines[above - 1])
        return below + share * (np.interp(tokens, *self._lines[above]) - below)

    def save(self, path: Path) -> None:
        """Write a convex model as JSON, without what was observed since.

        Raises ValueError where it is not convex, and StropError when the place cannot be written.
        """
        self._require_convex()
        rest = {"draft_s": self.draft_s, "draft_slope": self.draft_slope, "node_s": self.node_s}
        with atomic(path) as unfinished:
            unfinished.write_text(json.dumps({"strop": 1, "curves": self.curves, **rest}))

    @classmethod
    def load(cls, path: Path) -> "CostModel":
        """Read what `save` wrote. Raises StropError when it is not there or not a convex cost model."""
        try:
            model = cls._from_dict(json.loads(path.read_text()))
            model._require_convex()
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise StropError(
                f"cannot read the cost model in {path} ({reason(error)}): delete it, and measure again"
            ) from error
        return model

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> "CostModel":
        if data["strop"] != 1:
            raise ValueError(f"format {quoted(data['strop'])} is not known")
        curves = {
            int(context): {int(tokens): float(seconds) for tokens, seconds in curve.items()}
            for context, curve in data["curves"].items()
        }
        return cls(curves, *(float(data[name]) for name in ("draft_s", "draft_slope", "node_s")))

    def _require_convex(self) -> None:
        """Raise ValueError unless every curve is non-decreasing and convex, up to rounding."""
        for context, (tokens, seconds) in zip(self._contexts, self._lines, strict=True):
            slopes = np.diff(seconds[:-1]) / np.diff(tokens[:-1])
            if np.diff(slopes, prepend=0.0).min() < -1e-9 * seconds[-2]:
                raise ValueError(f"the curve of context {context} is not convex")


def _toward(ratio: float, factor: float) -> float:
    """A factor in force, moved towards one that was measured."""
    return factor + WEIGHT * (min(max(ratio, factor / CLIP), factor * CLIP) - factor)


def _line(curve: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and seconds of a curve, continued with its last slope. Raises ValueError where it is none."""
    points = sorted(curve.items())
    tokens, seconds = np.array(points, dtype=float).T
    if not (np.isfinite(seconds).all() and seconds.min() > 0):
        raise ValueError("a curve's latency is not a time")
    if not 1 <= tokens[0] < tokens[-1] < FAR:
        raise ValueError("a curve's sizes are not numbers of tokens")
    slope = max(0.0, (seconds[-1] - seconds[-2]) / (tokens[-1] - tokens[-2]))
    return np.append(tokens, FAR), np.append(seconds, seconds[-1] + slope * (FAR - tokens[-1]))


def convex(points: Mapping[int, float]) -> dict[int, float]:
    """The non-decreasing convex curve {tokens: seconds} nearest to measured points, by relative errors.

    Such a curve is a constant plus hinges (n - k)+ at its points, none with a negative weight.
    """
    n, seconds = np.array(sorted(points.items()), dtype=float).T
    hinges = np.maximum(n[:, None] - n[:-1], 0) / n[-1]
    basis = np.hstack([np.ones((len(n), 1)), hinges])
    weights, _ = nnls(basis / seconds[:, None], np.ones(len(n)))
    return dict(zip(sorted(points), (basis @ weights).tolist(), strict=True))


def profile(
    measure: Callable[[int, int], float],
    contexts: Sequence[int],
    tokens: Sequence[int],
    report: Callable[[str, float], None] = lambda what, share: None,
) -> dict[int, dict[int, float]]:
    """Median seconds of one target forward over each number of `tokens` behind each of `contexts`.

    `measure(tokens, context)` gives the seconds of one; `report` hears what is measured and the share done.
    Sizes take turns, up and down in alternation, so that drift falls on all of them alike.
    """
    found = {}
    for done, context in enumerate(contexts):
        for _ in range(WARM_UPS):
            for size in tokens:
                measure(size, context)
        repeats: list[dict[int, float]] = []
        deadline = time.monotonic() + SECONDS
        while len(repeats) < LEAST_REPEATS or (len(repeats) < MOST_REPEATS and time.monotonic() < deadline):
            order = tokens if len(repeats) % 2 == 0 else tokens[::-1]
            repeats.append({size: measure(size, context) for size in order})
            share = min(len(repeats) / LEAST_REPEATS, 1.0)
            report(f"context {context}", (done + share) / len(contexts))
        found[context] = {size: float(np.median([times[size] for times in repeats])) for size in tokens}
    return found


def cost_path(*names: Any) -> Path:
    """Where the cost model of what has these `names` is kept: $STROP_CACHE, else the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("STROP_CACHE") or user / "strop") / "cost" / f"{digest(*names)}.json"
