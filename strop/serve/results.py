"""What became of every request of a simulation, as columns, and in few numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from strop.serve.base import TIERS
from strop.serve.instance import Flight

TIMES = ("arrived", "begun", "computed", "room", "moved", "first", "ended")
"""The steps of a request, in order, in seconds."""
STAGES = ("queue", "prefill", "transfer", "first decode")
"""What the time to the first token is made of."""


@dataclass(frozen=True)
class Results:
    """One run. Columns `[N]`, a request each, in order of arrival."""

    columns: dict[str, np.ndarray]
    spans: np.ndarray
    """Iterations of decoding `[S, 4]`: how many in a row, seconds of the first and of the last, requests."""
    events: int
    """Calls that the clock made."""
    seconds: float
    """What the simulation took."""

    def __len__(self) -> int:
        return len(self.columns["arrived"])

    def ttft(self) -> np.ndarray:
        """Seconds from arrival to the end of the first iteration, `[N]`."""
        return self.columns["first"] - self.columns["arrived"]

    def stages(self) -> dict[str, np.ndarray]:
        """The parts of `ttft`, `[N]` each; waiting for memory to decode in counts as transfer."""
        c = self.columns
        ends = (c["arrived"], c["begun"], c["computed"], c["moved"], c["first"])
        return {name: b - a for name, (a, b) in zip(STAGES, pairwise(ends), strict=True)}

    def tpot(self) -> np.ndarray:
        """Mean seconds between a request's tokens, `[N]`; not a number where there is one token."""
        c = self.columns
        later = c["output"] - 1
        return np.where(later > 0, (c["ended"] - c["first"]) / np.maximum(later, 1), np.nan)

    def gap(self) -> float:
        """Mean seconds of an iteration, over the tokens that they give; 0 where there is none."""
        n, first, last, requests = self.spans.T
        return float((n * requests * (first + last) / 2).sum() / max((n * requests).sum(), 1))

    def gaps(self, shares: Sequence[float]) -> np.ndarray:
        """Quantiles of the same; iterations in a row take the mean of their ends."""
        if not len(self.spans):
            return np.zeros(len(shares))
        n, first, last, requests = self.spans.T
        order = np.argsort((first + last) / 2, kind="stable")
        weight = np.cumsum((n * requests)[order])
        places = np.searchsorted(weight, np.asarray(shares) * weight[-1])
        return ((first + last) / 2)[order][np.minimum(places, len(order) - 1)]

    def summary(self, slo: float) -> dict[str, Any]:
        """Few numbers: seconds, shares, tokens a second; `slo` bounds the time to the first token."""
        c, ttft = self.columns, self.ttft()
        span = float(c["ended"].max() - c["arrived"].min())
        moved = c["tier"][c["tier"] >= 0]
        prompts = c["prompt"].sum()
        return {
            "requests": len(self),
            "ttft_mean": float(ttft.mean()),
            **{f"ttft_p{q}": float(np.percentile(ttft, q)) for q in (50, 90, 99)},
            **{f"{name.replace(' ', '_')}_mean": float(v.mean()) for name, v in self.stages().items()},
            "tbt_mean": self.gap(),
            "tbt_p99": float(self.gaps([0.99])[0]),
            "slo": float((ttft <= slo).mean()),
            "goodput": float((ttft <= slo).sum() / span),
            "tokens_per_second": float(c["output"].sum() / span),
            "tiers": {
                name: float((moved == i).mean()) if len(moved) else 0.0 for i, name in enumerate(TIERS)
            },
            "reused": float(c["reused"].sum() / prompts),
            "hit": float(c["hit"].sum() / prompts),
            "recomputed": float(c["recomputed"].sum()),
        }


def collect(
    flights: Sequence[Flight], spans: list[tuple[int, float, float, int]], events: int, seconds: float
) -> Results:
    """The results of flights, all of which have ended."""
    columns = {name: np.array([getattr(f, name) for f in flights]) for name in TIMES}
    columns |= {
        name: np.array([getattr(f, name) for f in flights], dtype=np.int64)
        for name in ("prefill", "decode", "tier", "reused", "hit")
    }
    columns["recomputed"] = np.array([f.recomputed for f in flights])
    columns["id"] = np.array([f.job.request.id for f in flights], dtype=np.int64)
    columns["session"] = np.array([f.job.request.session for f in flights], dtype=np.int64)
    columns["prompt"] = np.array([f.job.request.prompt for f in flights], dtype=np.int64)
    columns["output"] = np.array([f.job.output for f in flights], dtype=np.int64)
    return Results(columns, np.array(spans, dtype=float).reshape(-1, 4), events, seconds)
