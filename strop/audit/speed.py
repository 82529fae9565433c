"""How long a recipe takes, always interleaved with its baseline in one process.

Ratios are candidate over baseline, below 1 is faster. Each round times both, in alternating order, and gives
one ratio; the interval is a bootstrap over rounds. The KV-attributable part of a step is the step at the
stated context minus the step at context ~ 1, where next to nothing is cached.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from strop.audit.base import LanguageModel
from strop.core.intervals import bootstrap

Ratio = tuple[float, float, float]
"""Estimate and 95 % interval."""

LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 5, 15, 8.0
"""Rounds go on beyond the least until they took so long, or until the most."""
STEPS = 16


@dataclass(frozen=True)
class Speed:
    """Times of the candidate in seconds (medians over rounds) and ratios to the baseline."""

    ttft_s: float
    """Time to the first token."""
    step_s: float
    """Decode time per token after the first."""
    kv_s: float | None
    """Of that, the part that the cache at this context costs; None where it was not asked for."""
    ttft_ratio: Ratio
    step_ratio: Ratio
    kv_ratio: Ratio | None
    """None where the baseline's own KV part is within its noise, or it was not asked for."""


class Stamps(BaseStreamer):
    """Notes when the tokens of a generation arrive, and how many at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt first, then with every step's tokens."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.tokens.append(value.numel())

    def end(self) -> None:
        """Nothing is left to do."""


def generation_times(lm: LanguageModel, rows: Sequence[Sequence[int]], steps: int) -> tuple[float, float]:
    """Seconds to the first token and per token after it, greedily generating 1 + `steps` for each row.

    Speculation brings several tokens at a time, the first one included, and may bring all at once: then the
    first token's time has no part of its own, and the whole is divided among all tokens.
    """
    stamps = Stamps(lm.device)
    lm.generate_ids(rows, 1 + steps, min_new_tokens=1 + steps, streamer=stamps)
    start, first, last = stamps.times[0], stamps.times[1], stamps.times[-1]
    if (later := sum(stamps.tokens[2:]) / len(rows)) > 0:
        return first - start, (last - first) / later
    return first - start, (first - start) / (1 + steps)


def timings(
    lm: LanguageModel, rows: Sequence[Sequence[int]], steps: int, kv: bool
) -> tuple[float, float, float]:
    """Time to first token, time per further token, and its KV part, in seconds; 0 unless it is asked for."""
    first, step = generation_times(lm, rows, steps)
    if not kv:
        return first, step, 0.0
    _, bare = generation_times(lm, [row[:1] for row in rows], steps)
    return first, step, step - bare


def speed(
    base: LanguageModel,
    other: LanguageModel,
    batches: Sequence[Sequence[Sequence[int]]],
    step: Callable[[float], None] = lambda share: None,
    steps: int = STEPS,
    kv: bool = True,
) -> Speed:
    """Time both models on batches of prompts (token ids), which take turns.

    What speculation gains depends on the text, so the interval covers that as well. `step` hears the share
    done after each round; `steps` are the tokens timed behind each prompt's first.
    """
    for lm in (base, other):
        generation_times(lm, [row[:1] for row in batches[0]], 2)
    rounds: list[list[tuple[float, float, float]]] = []
    deadline = time.monotonic() + SECONDS
    while len(rounds) < LEAST_ROUNDS or (len(rounds) < MOST_ROUNDS and time.monotonic() < deadline):
        pair = ((0, base), (1, other))
        order = pair if len(rounds) % 2 == 0 else reversed(pair)
        rows = batches[len(rounds) % len(batches)]
        timed = {which: timings(lm, rows, steps, kv) for which, lm in order}
        rounds.append([timed[0], timed[1]])
        step(min(len(rounds) / LEAST_ROUNDS, 1.0))
    times = np.array(rounds)
    kv_base = times[:, 0, 2]
    measurable = kv and np.median(kv_base) > 2 * kv_base.std() and np.median(kv_base) > 0
    first, later, kv_s = (float(x) for x in np.median(times[:, 1], axis=0))
    return Speed(
        first,
        later,
        kv_s if kv else None,
        bootstrap(times[:, :, 0], _median_of_ratios),
        bootstrap(times[:, :, 1], _median_of_ratios),
        bootstrap(times[:, :, 2], _ratio_of_medians) if measurable else None,
    )


def _median_of_ratios(sample: np.ndarray) -> np.ndarray:
    """Candidate over baseline, `[m, rounds, 2]` to `[m]`: what drifts between rounds cancels."""
    return np.median(sample[:, :, 1] / sample[:, :, 0], axis=1)


def _ratio_of_medians(sample: np.ndarray) -> np.ndarray:
    """The same for differences of times, of which a single round's may be near zero."""
    medians = np.median(sample, axis=1)
    return medians[:, 1] / medians[:, 0]
