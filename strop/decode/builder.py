"""Best-first trees (DDTree, arXiv 2604.12989): the most probable prefixes, popped one after another.

One heap builds marginal, Markov and cost-aware trees: it reads a proposal's tables, and a stop rule says how
many of its pops are kept. A pop is never more probable than the one before, so the first n of them are the
best prefix-closed tree of n nodes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate, islice
from operator import mul

from torch import Generator
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from strop.core.errors import StropError
from strop.decode.drafter import Drafter
from strop.decode.proposal import Proposal
from strop.decode.sampled import draw_tree
from strop.decode.stop import StopRule
from strop.decode.tree import DraftTree


class BestFirst:
    """The nodes of a proposal in order of path probability; iterating yields each one's probability."""

    def __init__(self, proposal: Proposal, root: int) -> None:
        self.tokens, self.logp = proposal.tokens.tolist(), proposal.logp.tolist()
        self.next_row = proposal.next_row.tolist()
        self.token, self.parent, self.depth, self.logq = [root], [-1], [0], [0.0]
        self.heap: list[tuple[float, int, int, int, int, int]] = []
        self.order = 0
        self._push(0.0, 0, 1, 0, 0)

    def _push(self, logq: float, parent: int, depth: int, row: int, rank: int) -> None:
        """Queue the candidate of a rank in the row that continues `parent`, whose path has `logq`."""
        if depth > len(self.logp) or row < 0 or rank >= len(self.logp[depth - 1][row]):
            return
        total = logq + self.logp[depth - 1][row][rank]
        if total > -math.inf:
            self.order += 1
            heappush(self.heap, (-total, self.order, parent, depth, row, rank))

    def __iter__(self) -> Iterator[float]:
        while self.heap:
            negative, _, parent, depth, row, rank = heappop(self.heap)
            node = len(self.token)
            self.token.append(self.tokens[depth - 1][row][rank])
            self.parent.append(parent)
            self.depth.append(depth)
            self.logq.append(-negative)
            self._push(self.logq[parent], parent, depth, row, rank + 1)
            self._push(-negative, node, depth + 1, self.next_row[depth - 1][row][rank], 0)
            yield math.exp(-negative)

    def tree(self, nodes: int) -> DraftTree:
        """The tree of the first `nodes` pops."""
        end = nodes + 1
        return DraftTree(self.token[:end], self.parent[:end], self.depth[:end], self.logq[:end])


def chain(proposal: Proposal, root: int, most: int) -> DraftTree:
    """The likeliest candidate of each depth, following the links: one path of at most `most` nodes."""
    token, logq, row = [root], [0.0], 0
    for depth in range(min(most, proposal.horizon)):
        logp = float(proposal.logp[depth, row, 0])
        if logp == -math.inf:
            break
        token.append(int(proposal.tokens[depth, row, 0]))
        logq.append(logq[-1] + logp)
        row = int(proposal.next_row[depth, row, 0])
        if row < 0:
            break
    size = len(token)
    return DraftTree(token, list(range(-1, size - 1)), list(range(size)), logq)


class TreeBuilder(ABC):
    """Makes a proposal into the tree that is verified."""

    def bound(
        self, model: PreTrainedModel, drafter: Drafter, cache: Cache, report: Callable[[str, float], None]
    ) -> "TreeBuilder":
        """The builder for a target over caches like `cache`; `report` hears of what has to be measured."""
        return self

    @property
    @abstractmethod
    def most(self) -> int | None:
        """Most nodes of a tree; None: as many as the drafter sees ahead."""

    @property
    def width(self) -> int:
        """Candidates a row to ask of a drafter."""
        return 1

    @property
    def rests(self) -> bool:
        """Whether the next round is a plain step, without a draft."""
        return False

    def propose(self, drafter: Drafter, ids: Sequence[int]) -> Proposal:
        """What the drafter says of the tokens behind `ids`."""
        return drafter.propose(ids, self.width)

    @abstractmethod
    def build(
        self, proposal: Proposal, root: int, context: int, most: int, generator: Generator | None
    ) -> DraftTree:
        """A tree of at most `most` nodes behind `context` tokens that the target has read.

        `generator` is chance for trees that are drawn, None where decoding is greedy.
        """

    def expected(self, tree: DraftTree, context: int) -> float | None:
        """Tokens a second to expect of a round with this tree, where its cost is known."""
        return None

    def observe(  # noqa: B027 - most have nothing to learn
        self, nodes: int, context: int, emitted: int, verify_s: float, round_s: float
    ) -> None:
        """Hear what a round brought and took, as `StopRule.observe` does."""


@dataclass(frozen=True)
class Chain(TreeBuilder):
    """The likeliest tokens in a row, as DFlash has them verified."""

    tokens: int | None = None

    @property
    def most(self) -> int | None:
        return self.tokens

    def build(
        self, proposal: Proposal, root: int, context: int, most: int, generator: Generator | None
    ) -> DraftTree:
        return chain(proposal, root, most)


@dataclass(frozen=True)
class Grown(TreeBuilder):
    """A best-first tree of as many nodes as a stop rule keeps."""

    rule: StopRule

    @property
    def most(self) -> int | None:
        return self.rule.most

    @property
    def width(self) -> int:
        return max(self.rule.width, 1)

    @property
    def rests(self) -> bool:
        return self.rule.rests

    def build(
        self, proposal: Proposal, root: int, context: int, most: int, generator: Generator | None
    ) -> DraftTree:
        pops = BestFirst(proposal, root)
        return pops.tree(self.rule.size(islice(pops, most), context))

    def expected(self, tree: DraftTree, context: int) -> float | None:
        return self.rule.expected(len(tree) - 1, tree.expected_accepted(), context)

    def observe(self, nodes: int, context: int, emitted: int, verify_s: float, round_s: float) -> None:
        self.rule.observe(nodes, context, emitted, verify_s, round_s)


@dataclass(frozen=True)
class Drawn(TreeBuilder):
    """A tree drawn from the drafter's distributions, `widths[d]` children for every node of depth d."""

    widths: tuple[int, ...]
    replacement: bool = False

    @property
    def most(self) -> int | None:
        return sum(accumulate(self.widths, mul))

    def propose(self, drafter: Drafter, ids: Sequence[int]) -> Proposal:
        return drafter.sample(ids)

    def build(
        self, proposal: Proposal, root: int, context: int, most: int, generator: Generator | None
    ) -> DraftTree:
        if generator is None:
            raise StropError("greedy decoding draws no trees: use a best-first tree, or sample")
        if self.most > most:
            raise StropError(
                f"a tree of {self.most} nodes exceeds the {most} that fit here: draw a smaller one"
            )
        return draw_tree(proposal, root, self.widths, self.replacement, generator)
