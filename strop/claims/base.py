"""A claim: what a paper says, what was measured here, and the verdict.

A claim never passes or fails a test: its experiment runs, is deterministic, its controls behave, and
whichever way the answer falls is printed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

VERDICTS = ("reproduced", "partly", "not here", "needs a GPU")

Report = Callable[[str, float], None]
"""Called with what is being measured and the share done, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One hypothesis of a paper after its experiment."""

    paper: str
    """Key of the paper, such as "kvarn"."""
    claim: str
    """The hypothesis in one sentence."""
    paper_value: str
    """What the paper reports."""
    measured: str
    """What was measured here, in the same unit."""
    interval: tuple[float, float] | None
    """95 % interval of the measured value over `seeds`."""
    seeds: int
    """Independent repetitions."""
    varied: str
    """What differs between repetitions (data, initialisation, ...)."""
    verdict: str
    """One of VERDICTS."""
    reason: str
    """Why this verdict, with the regime."""
    scale: str
    """"cpu" or "gpu"."""
    seconds: float

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {VERDICTS}, got {self.verdict!r}")

    def to_dict(self) -> dict[str, Any]:
        """The claim as JSON."""
        return dataclasses.asdict(self)


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    sample = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(sample), (2000, len(sample)))
    low, high = np.percentile(sample[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)
