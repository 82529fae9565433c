"""How many nodes of a best-first tree are worth verifying."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from operator import truediv
from typing import ClassVar, Literal

from strop.decode.cost import CostModel

MEMORY = 0.98
"""Weight of the past in the price, from one round to the next."""


class StopRule(ABC):
    """Consumes the probabilities of a tree's nodes, none above the one before, and says how many to keep."""

    @property
    @abstractmethod
    def most(self) -> int:
        """Most nodes it can keep."""

    @property
    def width(self) -> int:
        """Candidates a row that can matter."""
        return self.most

    @property
    def rests(self) -> bool:
        """Whether the next round is a plain step, without a draft."""
        return False

    @abstractmethod
    def size(self, deltas: Iterator[float], context: int) -> int:
        """Nodes to keep, behind `context` tokens that the target has read."""

    def expected(self, nodes: int, phi: float, context: int) -> float | None:
        """Tokens a second to expect of a round with `nodes` nodes that promise `phi` tokens, where known."""
        return None

    def observe(  # noqa: B027 - a fixed rule has nothing to learn
        self, nodes: int, context: int, emitted: int, verify_s: float, round_s: float
    ) -> None:
        """Hear what a round with `nodes` nodes brought and took: tokens, seconds to verify and in all."""


@dataclass(frozen=True)
class FixedBudget(StopRule):
    """DDTree's rule: the best `budget` nodes, whatever they cost."""

    budget: int

    @property
    def most(self) -> int:
        return self.budget

    def size(self, deltas: Iterator[float], context: int) -> int:
        return sum(1 for _ in islice(deltas, self.budget))


@dataclass
class Throughput(StopRule):
    """CaDDTree's rule: the nodes that make theta = (1 + Phi) / (C_d + C_v), tokens a second, highest.

    Under a convex cost theta rises and then falls, so "greedy" stops at the first node that does not raise
    it. "scan" looks at all sizes up to `most`, for costs with steps. "buckets" looks only at trees that fill
    one of `edges`, the numbers of verified tokens to which a runtime with CUDA graphs pads; transformers pads
    nothing. A `price` of "round" maximises theta in every round; "global" maximises tokens over time of all
    rounds together: time costs the tokens that the rounds so far brought in it (Dinkelbach), and the first
    round is as with "round".

    Differs: n nodes cost a forward over n + 1 tokens, where the official code looks up n.
    """

    cost: CostModel
    mode: Literal["greedy", "scan", "buckets"] = "greedy"
    price: Literal["round", "global"] = "round"
    most: int = 1024
    width: ClassVar[int] = 32  # type: ignore[misc]
    edges: tuple[int, ...] = ()
    emitted: float = field(default=0.0, init=False)
    """Tokens of the newest rounds, and the seconds they took."""
    elapsed: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.mode not in ("greedy", "scan", "buckets"):
            raise ValueError(f'mode must be "greedy", "scan" or "buckets", got {self.mode!r}')
        if self.price not in ("round", "global"):
            raise ValueError(f'price must be "round" or "global", got {self.price!r}')
        if self.most < 0:
            raise ValueError(f"most must be at least 0, got {self.most}")
        self.edges = tuple(sorted(edge for edge in self.edges if edge <= self.most + 1))
        if (self.mode == "buckets") != bool(self.edges) or min(self.edges, default=1) < 1:
            raise ValueError('edges, from 1 to most + 1, and mode "buckets" need each other')
        if self.edges:
            self.most = self.edges[-1] - 1

    def size(self, deltas: Iterator[float], context: int) -> int:
        rounds = self.cost.rounds(context, self.most)
        return self._fill(deltas, rounds) if self.edges else self._grow(deltas, rounds)

    def _grow(self, deltas: Iterator[float], rounds: Iterator[float]) -> int:
        """The size with the highest score, up to the first that does not gain in greedy mode."""
        score, greedy = self._score(), self.mode == "greedy"
        tokens, kept = 1.0, 0
        best = score(tokens, next(rounds))
        for n, (seconds, delta) in enumerate(zip(rounds, deltas, strict=False), 1):
            tokens += delta
            gained = score(tokens, seconds)
            if gained > best:
                best, kept = gained, n
            elif greedy:
                break
        return kept

    def _fill(self, deltas: Iterator[float], rounds: Iterator[float]) -> int:
        """The best of the trees that fill an edge, or end before it because nothing is left."""
        score, best = self._score(), -float("inf")
        tokens, n, kept = 1.0, 0, 0
        for verified, seconds in enumerate(rounds, 1):
            if verified > 1 and (delta := next(deltas, None)) is not None:
                tokens, n = tokens + delta, n + 1
            if verified in self.edges and (gained := score(tokens, seconds)) > best:
                best, kept = gained, n
        return kept

    def _score(self) -> Callable[[float, float], float]:
        """What to maximise, of a round's tokens and seconds."""
        if self.price == "round" or not self.elapsed:
            return truediv
        theta = self.emitted / self.elapsed
        return lambda tokens, seconds: tokens - theta * seconds

    def expected(self, nodes: int, phi: float, context: int) -> float:
        """theta: tokens a second to expect of a round with `nodes` nodes that promise `phi` tokens."""
        return (1 + phi) / (self.cost.draft(context) + self.cost.verify(self._padded(nodes), context))

    def observe(self, nodes: int, context: int, emitted: int, verify_s: float, round_s: float) -> None:
        self.cost.observe(self._padded(nodes), context, verify_s)
        self.cost.observe_draft(nodes, context, round_s - verify_s)
        self.emitted = MEMORY * self.emitted + emitted
        self.elapsed = MEMORY * self.elapsed + round_s

    def _padded(self, nodes: int) -> int:
        """Tokens that are verified for a tree."""
        return next((edge for edge in self.edges if edge > nodes), nodes + 1)
