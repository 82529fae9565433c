"""A draft tree as flat lists: node 0 is the root, the newest token of the text; parents precede children."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftTree:
    """n drafted nodes behind a root; every list has n + 1 entries."""

    token: Sequence[int]
    parent: Sequence[int]
    """Index of the node before; -1 for the root."""
    depth: Sequence[int]
    """Tokens behind the root; 0 for the root."""
    logq: Sequence[float]
    """Log-probability of the path from the root, by the drafter; 0 for the root."""
    q: Tensor | None = None
    """Where the nodes were drawn and not chosen: what from, `[L, V]`, one distribution a depth."""
    replacement: bool = False
    """Whether siblings were drawn independently of one another, so that two may hold the same token."""

    def __len__(self) -> int:
        return len(self.token)

    @cached_property
    def child(self) -> dict[tuple[int, int], int]:
        """Index of the node that follows (node, token)."""
        return {(p, t): i for i, (p, t) in enumerate(zip(self.parent, self.token, strict=True)) if i}

    def children(self, node: int) -> list[int]:
        """The nodes that follow one, in order."""
        return [i for i, parent in enumerate(self.parent) if parent == node]

    def path(self, node: int) -> list[int]:
        """The nodes from the root to one, both included."""
        path = [node]
        while (node := self.parent[node]) >= 0:
            path.append(node)
        return path[::-1]

    def ancestor_mask(self) -> Tensor:
        """`[n + 1, n + 1]` bool: which nodes each node attends to, its ancestors and itself."""
        size = len(self)
        sees = np.eye(size, dtype=bool)
        sees[:, 0] = True
        rows, above = np.arange(size), np.asarray(self.parent)
        for _ in range(max(self.depth) - 1):
            above = np.maximum(above, 0)
            sees[rows, above] = True
            above = np.asarray(self.parent)[above]
        return torch.from_numpy(sees)

    def expected_accepted(self) -> float:
        """Phi: accepted tokens to expect if the drafter is right, the sum of all path probabilities."""
        return float(np.exp(np.asarray(self.logq[1:], dtype=float)).sum())

    def check(self) -> None:
        """Raise ValueError unless the lists describe a tree."""
        if not len(self.token) == len(self.parent) == len(self.depth) == len(self.logq) > 0:
            raise ValueError("a tree's lists differ in length")
        if (self.parent[0], self.depth[0], self.logq[0]) != (-1, 0, 0):
            raise ValueError("a tree starts with its root")
        for node in range(1, len(self)):
            parent = self.parent[node]
            if not 0 <= parent < node or self.depth[node] != self.depth[parent] + 1:
                raise ValueError(f"node {node} does not follow its parent")
            if not self.logq[node] <= self.logq[parent] + 1e-6:
                raise ValueError(f"node {node} is more probable than its parent")
        if not self.replacement and len(self.child) != len(self) - 1:
            raise ValueError("two siblings hold the same token")


def binary(tokens: Sequence[int]) -> DraftTree:
    """The tokens as a tree with two children a node, breadth first."""
    parent, depth = [-1], [0]
    for node in range(1, len(tokens)):
        parent.append((node - 1) // 2)
        depth.append(depth[parent[node]] + 1)
    return DraftTree(tokens, parent, depth, [0.0] * len(tokens))


def chained(tokens: Sequence[int]) -> DraftTree:
    """The tokens as a chain."""
    size = len(tokens)
    return DraftTree(tokens, list(range(-1, size - 1)), list(range(size)), [0.0] * size)


def bare(root: int) -> DraftTree:
    """A root without nodes: a plain step."""
    return DraftTree([root], [-1], [0], [0.0])
