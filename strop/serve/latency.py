"""How long an instance computes, from tokens to seconds.

A roofline with the constants of a 70B-class model on 4 GPUs (arXiv 2606.03910 gives the times, not the
constants, which are fitted), and a pipeline of stages with measured tables (arXiv 2606.03770).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from strop.core.evict.worth import RecomputeCost
from strop.core.method import Method

Run = tuple[int, int]
"""Tokens that are computed in one piece, and the tokens before them."""
SHORTEST, LONGEST = 1e-12, 1e9
"""Seconds of an iteration or of a token's work: with others times add up to what numbers do not hold."""
MOST_STAGES = 1000


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
            _require_seconds(name, value, zero=True)
        if self.iteration + self.decode_request < SHORTEST:
            raise ValueError(
                f"an iteration takes time: iteration or decode_request must be at least {SHORTEST:g}"
            )

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
        if not 1 <= self.stages <= MOST_STAGES or not self.decode_stage:
            raise ValueError(
                f"a pipeline has 1 to {MOST_STAGES} stages, and decode_stage seconds for at least one request"
            )
        _require_seconds("prefill_base", self.prefill_base, zero=True)
        _require_seconds("prefill_token", self.prefill_token)
        for value in self.decode_stage:
            _require_seconds("decode_stage", value)

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


def _require_seconds(name: str, value: float, zero: bool = False) -> None:
    least = 0 if zero else SHORTEST
    if not least <= value <= LONGEST:
        raise ValueError(f"{name} must be seconds from {least:g} to {LONGEST:g}, got {value:g}")
