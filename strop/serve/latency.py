"""How long an instance computes, from tokens to seconds.

A roofline with the constants of a 70B-class model on 4 GPUs (arXiv 2606.03910 gives the times, not the
constants, which are fitted), and a pipeline of stages with measured tables (arXiv 2606.03770).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from strop.core.eviction import RecomputeCost
from strop.core.method import Method

Run = tuple[int, int]
"""Tokens that are computed in one piece, and the tokens before them."""


class Latency(Method, ABC):
    """Seconds of an instance's work."""

    stages: int = 1
    """Pieces of a pipeline: a prompt keeps the instance for the time of one, and takes that of all."""

    @abstractmethod
    def prefill(self, runs: Sequence[Run]) -> float:
        """Seconds until the next prompt may begin after one of which these runs are computed."""

    @abstractmethod
    def cost(self, block: int) -> RecomputeCost:
        """Seconds that computing a block of so many tokens again takes."""

    @abstractmethod
    def decode(self, batch: int) -> tuple[float, float]:
        """Seconds of one iteration of 0 or more requests: what is fixed, and what every held token adds."""


@dataclass(frozen=True, kw_only=True)
class Roofline(Latency):
    """Prefill in tokens and pairs of tokens, decode in requests and bytes read."""

    prefill_token: float = 70e-6
    """Seconds a computed token."""
    prefill_pair: float = 1.2e-9
    """Seconds a pair of a computed token and one that it attends to."""
    iteration: float = 10.5e-3
    """Seconds of an iteration, whatever is in it."""
    decode_request: float = 0.12e-3
    """Seconds a request in it."""
    decode_token: float = 327_680 / (4 * 3.35e12 * 0.7)
    """Seconds a token of KV that it reads."""

    def __post_init__(self) -> None:
        for name, value in self.fields().items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be seconds, 0 or more, got {value}")
        if self.iteration + self.decode_request <= 0:
            raise ValueError("an iteration takes time: iteration or decode_request must be above 0")

    def prefill(self, runs: Sequence[Run]) -> float:
        return sum(n * (self.prefill_token + self.prefill_pair * (n / 2 + before)) for n, before in runs)

    def cost(self, block: int) -> RecomputeCost:
        return RecomputeCost.of(self.prefill_token, self.prefill_pair, block)

    def decode(self, batch: int) -> tuple[float, float]:
        return self.iteration + self.decode_request * batch, self.decode_token


@dataclass(frozen=True, kw_only=True)
class Pipeline(Latency):
    """A pipeline whose slowest stage sets the pace; of M stages, a pass takes M times as long."""

    stages: int = 1
    prefill_base: float = 0.0
    """Seconds of a pass with prompts in the slowest stage, however many tokens."""
    prefill_token: float
    """Seconds a token in the slowest stage."""
    decode_stage: tuple[float, ...]
    """Seconds in the slowest stage for 1, 2, ... requests at once."""

    def __post_init__(self) -> None:
        if self.stages < 1 or not self.decode_stage:
            raise ValueError("a pipeline has a stage, and seconds for at least one request")
        if not all(0 < value < math.inf for value in (self.prefill_token, *self.decode_stage)):
            raise ValueError("seconds of a stage must be above 0")
        if not 0 <= self.prefill_base < math.inf:
            raise ValueError(f"prefill_base must be seconds, 0 or more, got {self.prefill_base}")

    def prefill(self, runs: Sequence[Run]) -> float:
        tokens = sum(n for n, _ in runs)
        return self.prefill_base + self.prefill_token * tokens if tokens else 0.0

    def cost(self, block: int) -> RecomputeCost:
        return RecomputeCost.of(self.prefill_token, 0.0, block)

    def decode(self, batch: int) -> tuple[float, float]:
        """Requests are spread over the stages; more than the table has take as many turns as needed."""
        if not batch:
            return 0.0, 0.0
        share = -(-batch // self.stages)
        turns = -(-share // len(self.decode_stage))
        return self.stages * turns * self.decode_stage[-(-share // turns) - 1], 0.0
