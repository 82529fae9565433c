"""A drafter that costs next to nothing: what followed the last times the newest n-gram occurred in the text.

The continuations of several occurrences make a trie; a token's probability is its share of them, with one
count set aside for whatever has not followed yet.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch

from strop.decode.drafter import Drafter
from strop.decode.proposal import Proposal

OCCURRENCES = 8
"""Newest occurrences that are looked at."""


class NGram(Drafter):
    """Looks up the longest n-gram that occurred before, of at most `longest` tokens."""

    def __init__(self, horizon: int = 10, longest: int = 3) -> None:
        self.horizon, self.longest = horizon, longest
        self.reset()

    def reset(self) -> None:
        self.places: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        self.known = 0

    def propose(self, ids: Sequence[int], width: int) -> Proposal:
        self._read(ids)
        return self._trie([ids[at : at + self.horizon] for at in self._occurrences(ids)], width)

    def _read(self, ids: Sequence[int]) -> None:
        """Note where the n-grams that end before the newest token are continued."""
        for end in range(max(self.known, 1), len(ids)):
            for n in range(1, min(self.longest, end) + 1):
                self.places[tuple(ids[end - n : end])].append(end)
        self.known = max(len(ids), 1)

    def _occurrences(self, ids: Sequence[int]) -> list[int]:
        for n in range(min(self.longest, len(ids)), 0, -1):
            if found := self.places.get(tuple(ids[-n:])):
                return found[-OCCURRENCES:]
        return []

    def _trie(self, continuations: list[Sequence[int]], width: int) -> Proposal:
        """A table whose rows at a depth are the trie's nodes above it."""
        rows, levels = [continuations] if continuations else [], []
        while rows and len(levels) < self.horizon:
            level, below = [], []
            for held in rows:
                followers: defaultdict[int, list[Sequence[int]]] = defaultdict(list)
                for continuation in held:
                    followers[continuation[0]].append(continuation[1:])
                ranked = sorted(followers.items(), key=lambda item: -len(item[1]))[:width]
                entries = []
                for token, rest in ranked:
                    longer = [continuation for continuation in rest if continuation]
                    entries.append((token, len(rest) / (len(held) + 1), len(below) if longer else -1))
                    below += [longer] if longer else []
                level.append(entries)
            levels.append(level)
            rows = below
        return _table(levels)


def _table(levels: list[list[list[tuple[int, float, int]]]]) -> Proposal:
    """Ragged rows of (token, probability, row below) as a proposal; what is missing has no probability."""
    shape = (
        len(levels),
        max((len(level) for level in levels), default=1),
        max((len(row) for level in levels for row in level), default=1),
    )
    tokens = torch.zeros(shape, dtype=torch.int64)
    p, links = torch.zeros(shape), torch.full(shape, -1)
    for depth, level in enumerate(levels):
        for m, row in enumerate(level):
            held = list(zip(*row, strict=True))
            for table, values in zip((tokens, p, links), held, strict=True):
                table[depth, m, : len(row)] = torch.tensor(values, dtype=table.dtype)
    links[-1:] = -1
    return Proposal("markov", tokens, p.log(), links)
