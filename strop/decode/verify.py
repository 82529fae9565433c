"""Lossless verification: which drafted nodes the target takes, and the token it emits behind them.

A tree whose nodes were chosen is walked with the target's own tokens: exact for any tree, and no lossless
rule accepts more of it. Ratio tests need nodes that were really drawn from the `q` they divide by; applied to
a drafter's likeliest tokens they accept more, and the output no longer follows the target.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from strop.core.errors import StropError
from strop.decode.tree import DraftTree


class Judge(Protocol):
    """The target at the nodes of one tree; a path lists node indices from the root on and must not be kept.

    Temperature and logits processors are applied, and processors see the text along the path.
    """

    generator: torch.Generator | None
    """Chance for the tests of sampled trees, on the host; None if decoding is greedy."""

    def token(self, path: list[int]) -> int:
        """The target's own token behind the last node of a path."""

    def probabilities(self, path: list[int]) -> Tensor:
        """Its distribution `[V]` there, float, on the host."""


class Verdict(NamedTuple):
    """What one round emits: the tokens of the path but for the root, then the bonus."""

    path: list[int]
    """Accepted nodes, the root first."""
    bonus: int


class Verifier(ABC):
    """Decides how much of a tree is emitted, such that the output follows the target's distribution."""

    @abstractmethod
    def verify(self, tree: DraftTree, judge: Judge) -> Verdict:
        """The accepted path and the token behind it; StropError for a tree or a target it cannot test."""


class AncestralWalk(Verifier):
    """Follow the target's own tokens for as long as the tree has them."""

    def verify(self, tree: DraftTree, judge: Judge) -> Verdict:
        path, child = [0], tree.child
        while (node := child.get((path[-1], token := judge.token(path)))) is not None:
            path.append(node)
        return Verdict(path, token)


@dataclass(frozen=True)
class RecursiveRejection(Verifier):
    """Test children in order, root to leaf: accept x with min(1, p(x) / q(x)), or go on with norm((p - q)+).

    For independent children (SpecInfer, arXiv 2305.09781) or, without `replacement`, for distinct ones, where
    q loses each rejected token (Sequoia, arXiv 2402.12374). StropError for a tree drawn in the other way.
    """

    replacement: bool

    def verify(self, tree: DraftTree, judge: Judge) -> Verdict:
        rows, generator = _sampled(tree, judge, self.replacement)
        path = [0]
        while True:
            p, q = judge.probabilities(path).double(), rows[len(path) - 1]
            for node in tree.children(path[-1]):
                x = tree.token[node]
                if _uniform(generator) * q[x] < p[x]:
                    path.append(node)
                    break
                rest = (p - q).clamp(min=0)
                p = rest / rest.sum() if rest.any() else p
                q = q if self.replacement else _without(q, x)
            else:
                return Verdict(path, _draw(p, generator))


class Traversal(Verifier):
    """Test paths from the leaf to the root, for distinct children (Traversal Verification, arXiv 2505.12398).

    A leaf that fails is taken out of the tree, and its parent goes on with what is left of p and q; no less
    is accepted than from the root. The updates are a reconstruction. StropError for independent children.
    """

    def verify(self, tree: DraftTree, judge: Judge) -> Verdict:
        rows, generator = _sampled(tree, judge, False)
        path: list[int] = []
        states: list[_State] = []

        def enter(node: int, r: float) -> None:
            path.append(node)
            p, q = judge.probabilities(path).double(), rows[len(path) - 1]
            states.append(_State(p, q, r, tree.children(node)[::-1]))

        enter(0, 1.0)
        while True:
            state = states[-1]
            if state.untested:
                node = state.untested.pop()
                enter(node, state.acceptance(tree.token[node]))
            elif _uniform(generator) < state.r:
                return Verdict(path, _draw(state.p, generator))
            else:
                states.pop()
                states[-1].reject(tree.token[path.pop()])


@dataclass
class _State:
    """A node on the current path of a traversal."""

    p: Tensor
    q: Tensor
    r: float
    """Chance that the path up to here is accepted if nothing below is; 1 at the root."""
    untested: list[int]
    """Children still in the tree, the next one last."""

    def acceptance(self, x: int) -> float:
        """The r of a child that holds x."""
        return min(1.0, self.r * float(self.p[x] / self.q[x]))

    def reject(self, x: int) -> None:
        """Take out the child that holds x."""
        rest = (self.r * self.p - self.q).clamp(min=0)
        left = float(rest.sum())
        if left > 0:
            self.p = rest / left
        if self.r < 1:
            self.r = left / (left + 1 - self.r)
        self.q = _without(self.q, x)


def _sampled(tree: DraftTree, judge: Judge, replacement: bool) -> tuple[list[Tensor], torch.Generator]:
    """What each depth was drawn from, nothing behind the last, and what tests are drawn from."""
    if tree.q is None:
        raise StropError(
            "ratio tests need nodes drawn from the drafter and these were chosen: use AncestralWalk"
        )
    if tree.replacement != replacement:
        drawn = "with" if tree.replacement else "without"
        raise StropError(
            f"the tree was drawn {drawn} replacement: use RecursiveRejection(replacement={tree.replacement})"
        )
    if judge.generator is None:
        raise StropError(
            "greedy decoding has no probability to test: use AncestralWalk, or a temperature above 0"
        )
    return [*tree.q, tree.q.new_empty(0)], judge.generator


def _without(q: Tensor, x: int) -> Tensor:
    """q given that it is not x."""
    q = q.index_fill(0, torch.tensor([x]), 0)
    return q / q.sum()


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def _draw(p: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(p, 1, generator=generator))
