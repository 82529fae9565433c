"""kvpress's scorers as eviction methods: what its presses score once is scored here at every eviction.

A press of kvpress (https://github.com/NVIDIA/kvpress) that scores keys and values alone serves as it is. One
that asks for the model's hidden states or attention weights is refused, for a cache sees neither.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from strop.core.errors import StropError
from strop.kv.evicting import Candidates, EvictingKV


class Scorer(Protocol):
    """What is asked of a press: kvpress's `ScorerPress.score`."""

    def score(
        self, module: None, hidden_states: None, keys: Tensor, values: Tensor, attentions: None, kwargs: dict
    ) -> Tensor:
        """Scores `[B, H_kv, n]` of keys and values `[B, H_kv, n, D]`; the highest stay."""


@dataclass(frozen=True, kw_only=True)
class Press(EvictingKV):
    """Keep the tokens that a press scores highest."""

    press: Scorer
    """A `ScorerPress` of kvpress, such as `KnormPress()`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not hasattr(self.press, "score"):
            raise ValueError(f"press must be a ScorerPress of kvpress, got {type(self.press).__name__}")

    def settings(self) -> str:
        return self.spell(f"{type(self.press).__name__} {self.budget}", "press", "budget")

    def scores(self, candidates: Candidates) -> Tensor:
        try:
            found = self.press.score(None, None, candidates.keys, candidates.values, None, {})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a press asserts and raises what it likes
            raise StropError(
                f"{type(self.press).__name__} asks for more than keys and values ({error}), which a cache "
                "does not see: take a press that scores these alone, such as KnormPress or KeyDiffPress"
            ) from error
        if found.shape != candidates.keys.shape[:3]:
            raise StropError(
                f"{type(self.press).__name__} gives scores {tuple(found.shape)} for keys "
                f"{tuple(candidates.keys.shape)}: a press gives one score a token and KV head"
            )
        return found.float()
