"""What the audit measures need of a model, and the intervals they share."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

RESAMPLES = 2000


class LanguageModel(Protocol):
    """A model with a recipe in force; `strop.Model` is one."""

    model: PreTrainedModel
    tokenizer: Any

    @property
    def device(self) -> torch.device: ...

    def new_cache(self) -> Cache:
        """An empty cache of the recipe's kv method."""
        ...

    def generate_ids(
        self, rows: Sequence[Sequence[int]], max_new_tokens: int, **options: Any
    ) -> list[list[int]]:
        """Continue token ids."""
        ...


def bootstrap(
    units: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> tuple[float, float, float]:
    """Estimate and 95 % percentile interval of a statistic over independent units.

    `units` `[n, ...]`; `statistic` maps resamples `[m, n, ...]` to `[m]`. A single unit bounds nothing: its
    interval is infinite.
    """
    estimate = float(statistic(units[None])[0])
    if len(units) < 2:
        return estimate, -math.inf, math.inf
    picks = np.random.default_rng(seed).integers(0, len(units), (RESAMPLES, len(units)))
    low, high = np.percentile(statistic(units[picks]), [2.5, 97.5])
    return estimate, float(low), float(high)
