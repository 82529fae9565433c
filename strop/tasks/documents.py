r"""Look-ups in documents: each states values under keys, and a query asks for the value of one key.

    document   `[kmo=170;tib=449;]` and a line break
    query      `?kmo=`
    answer     `170`

A prompt is its documents, one after another, and a query: `[kmo=170;tib=449;]\n[sur=038;]\n?kmo=`. No key
occurs twice among the documents of a prompt, so their order changes nothing about what is asked: a model that
reads each document by itself can answer as well as one that reads them in sequence. Keys are three letters,
values three digits, and both are held out: the text of a key or value alone decides its side, so a held-out
look-up has no key and no value that training ever saw. Each look-up follows from (seed, index).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from random import Random
from typing import Literal

from strop.core.errors import StropError
from strop.tasks.base import Example

Split = Literal["train", "held_out"]
Span = tuple[int, int]

_LETTERS, _DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"


@dataclass(frozen=True)
class Size:
    """Bounds, both ends included, from which each look-up draws its own size."""

    documents: Span = (2, 8)
    """How many documents stand before the query."""
    facts: Span = (2, 8)
    """How many values each of them states."""
    queries: int = 6
    """How many keys are asked for, each by itself; fewer where there are fewer facts."""

    def __post_init__(self) -> None:
        for low, high in (self.documents, self.facts):
            if not 1 <= low <= high:
                raise StropError("A look-up needs bounds of at least 1, the smaller one first.")
        if self.queries < 1 or self.documents[1] * self.facts[1] > MOST_FACTS:
            raise StropError(f"A look-up takes at least one query and at most {MOST_FACTS} facts in all.")


MOST_FACTS = 200
"""Facts of a prompt, for which the held-out side has keys enough."""


@dataclass(frozen=True)
class LookUp:
    """Documents, and queries on them of which each is asked by itself."""

    documents: tuple[str, ...]
    queries: tuple[str, ...]
    answers: tuple[str, ...]
    places: tuple[int, ...]
    """The document that holds each query's answer, counted from 0."""

    def example(self, query: int = 0) -> Example:
        """One query as a plain prompt, all documents before it."""
        prompt = "".join(self.documents) + self.queries[query]
        return Example(prompt, self.answers[query], self.answers[query])

    def reordered(self, order: Sequence[int]) -> LookUp:
        """The same queries on the same documents, of which number `order[i]` comes to place i."""
        if sorted(order) != list(range(len(self.documents))):
            raise StropError(f"An order of the documents names each of 0 to {len(self.documents) - 1} once.")
        documents = tuple(self.documents[number] for number in order)
        return replace(self, documents=documents, places=tuple(order.index(place) for place in self.places))


def look_ups(
    count: int, seed: int, size: Size | None = None, split: Split = "held_out", start: int = 0
) -> list[LookUp]:
    """Look-ups `start` to `start + count - 1` of a seed's endless series."""
    return [_look_up(Random(f"{seed}/{i}"), size or Size(), split) for i in range(start, start + count)]


def answer(completion: str) -> str | None:
    """The three digits that a completion begins with, or None when it begins otherwise."""
    found = re.match(r"\d{3}(?!\d)", completion)
    return found[0] if found else None


def is_held_out(text: str) -> bool:
    """The split rule of keys and values: the first byte of the SHA-256 falls below 26 (10 %)."""
    return hashlib.sha256(text.encode()).digest()[0] < 26


def _look_up(rng: Random, size: Size, split: Split) -> LookUp:
    counts = [rng.randint(*size.facts) for _ in range(rng.randint(*size.documents))]
    keys = rng.sample(_side(_LETTERS, split), sum(counts))
    facts = [(key, rng.choice(_side(_DIGITS, split))) for key in keys]
    places = [place for place, count in enumerate(counts) for _ in range(count)]
    stated = [
        "".join(f"{key}={value};" for (key, value), at in zip(facts, places, strict=True) if at == place)
        for place in range(len(counts))
    ]
    asked = rng.sample(range(len(facts)), min(size.queries, len(facts)))
    return LookUp(
        documents=tuple(f"[{lines}]\n" for lines in stated),
        queries=tuple(f"?{facts[i][0]}=" for i in asked),
        answers=tuple(facts[i][1] for i in asked),
        places=tuple(places[i] for i in asked),
    )


@cache
def _side(characters: str, split: Split) -> tuple[str, ...]:
    """All texts of three characters that belong to a side."""
    texts = map("".join, product(characters, repeat=3))
    return tuple(text for text in texts if is_held_out(text) == (split == "held_out"))
