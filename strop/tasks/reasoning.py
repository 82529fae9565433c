"""Procedural problems whose worked solutions are long and lean on facts far back.

A problem is a text of four parts: a lead of filler prose, a block of facts, a gap of filler, and a
question. Its solution restates each asked fact and carries a running sum through every line, so
that one wrong look-up anywhere changes the final answer. The two digits are summed apart, each
modulo 10 (17 and 95 make 02): the skill under test is look-up and state, not carrying.

In bytes, at the `FULL` size: facts begin after byte 128 and end at least 256 bytes before their
first use, prompts take 500 to 900, solutions 200 to 600. Under a byte-level tokenizer bytes are
tokens, which makes this a task on which damage to a key-value cache is seen as lost accuracy.

    sum      facts `ka=17;`        asked `sum: ka mo`                lines `ka=17 sum=69`
    chain    also  `mo=ka;`        asked `find: mo ti`               lines `mo=ka=17 sum=69`
    recall   facts `red fox=17;`   asked `recall: red fox,tan owl`   lines `red fox=17 sum=69`

Each problem follows from (seed, index) alone. A hash of its facts and question, filler left out,
decides its side: one in ten is held out, so the training side can never contain a held-out problem.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from strop.core.errors import StropError
from strop.tasks.base import Example

Split = Literal["train", "held_out"]
Span = tuple[int, int]

_FILLER = (
    "the a grey old quiet river mill road turns past over under stone field and then slow wind "
    "hill long light water near each morning small door waits while birds cross open green low"
)
_ADJECTIVES = ["red", "tan", "wet", "shy", "big", "odd", "raw", "icy"]
_NOUNS = ["fox", "owl", "cat", "elk", "hen", "bee", "ant", "cod", "yak", "emu"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PAIRS = [a + b for a in _LETTERS for b in _LETTERS]
_KEYS = [f"{a} {n}" for a in _ADJECTIVES for n in _NOUNS]


@dataclass(frozen=True)
class Size:
    """Bounds, both ends included, from which each problem draws its own size."""

    facts: Span
    """How many facts the prompt states."""
    steps: Span
    """How many of them the solution uses; never more than there are facts."""
    lead: Span
    """Filler bytes before the facts."""
    gap: Span
    """Filler bytes between the facts and the question."""
    hops: int = 3
    """Longest chain of assignments, for the kind `chain`."""


FULL: dict[str, Size] = {
    "sum": Size(facts=(16, 40), steps=(16, 34), lead=(132, 170), gap=(258, 320)),
    "chain": Size(facts=(20, 44), steps=(15, 26), lead=(132, 170), gap=(258, 320)),
    "recall": Size(facts=(14, 24), steps=(12, 18), lead=(132, 150), gap=(258, 300)),
}
"""The size of each kind on which models are judged."""

KINDS = tuple(FULL)


def problems(
    count: int,
    seed: int,
    kinds: Sequence[str] = KINDS,
    split: Split = "held_out",
    sizes: dict[str, Size] | None = None,
    start: int = 0,
) -> list[Example]:
    """Problems `start` to `start + count - 1` of a seed's endless series, kinds taking turns.

    `sizes` maps a kind to its `Size`; a kind that it lacks has its full size.
    """
    unknown = [k for k in kinds if k not in FULL]
    if unknown or not kinds:
        raise StropError(f"Unknown problem kind {unknown}; the known ones are {', '.join(KINDS)}.")
    return [_problem(seed, i, kinds[i % len(kinds)], split, sizes or {}) for i in range(start, start + count)]


def final_answer(text: str) -> str | None:
    """The digits behind the last `answer` of a completion, or None when it has none."""
    found = re.findall(r"^answer (\d+)\s*$", text, flags=re.MULTILINE)
    return found[-1] if found else None


def is_held_out(content: str) -> bool:
    """The split rule: the first byte of the SHA-256 of facts and question falls below 26 (10 %)."""
    return hashlib.sha256(content.encode()).digest()[0] < 26


def add(a: str, b: str) -> str:
    """Two-digit texts added digit by digit, each modulo 10: `add("17", "95") == "02"`."""
    return "".join(str((int(x) + int(y)) % 10) for x, y in zip(a, b, strict=True))


def _problem(seed: int, index: int, kind: str, split: Split, sizes: dict[str, Size]) -> Example:
    """Draw until the content falls on the wanted side; a draw follows from its own number."""
    size = sizes.get(kind, FULL[kind])
    draw = 0
    while True:
        rng = Random(f"{seed}/{index}/{draw}/{kind}")
        facts, question, lines = _BUILDERS[kind](rng, size)
        if is_held_out(f"{facts}\n{question}") == (split == "held_out"):
            break
        draw += 1
    lead, gap = _prose(rng, rng.randint(*size.lead)), _prose(rng, rng.randint(*size.gap))
    answer, worked = "00", []
    for line in lines:
        answer = add(answer, line[-2:])
        worked.append(f"{line} sum={answer}\n")
    prompt = f"{lead}\n{facts}\n{gap}\n{question}\nwork:\n"
    return Example(prompt, answer, "".join(worked) + f"answer {answer}")


_Built = tuple[str, str, list[str]]
"""Facts, question, and the found part of each line of the solution, a value at its end."""


def _counts(rng: Random, size: Size) -> tuple[int, int]:
    facts = rng.randint(*size.facts)
    return facts, min(rng.randint(*size.steps), facts)


def _values(rng: Random, keys: list[str]) -> dict[str, str]:
    return {key: f"{rng.randrange(100):02d}" for key in keys}


def _sum(rng: Random, size: Size) -> _Built:
    """Independent values, looked up in another order than they were stated."""
    facts, steps = _counts(rng, size)
    values = _values(rng, rng.sample(_PAIRS, facts))
    asked = rng.sample(list(values), steps)
    stated = "".join(f"{name}={value};" for name, value in values.items())
    return stated, f"sum: {' '.join(asked)}", [f"{name}={values[name]}" for name in asked]


def _chain(rng: Random, size: Size) -> _Built:
    """Variables that take a value or an earlier variable; the solution walks back to the value."""
    facts, steps = _counts(rng, size)
    trail: dict[str, str] = {}
    open_ends: list[str] = []
    stated = []
    for name, value in _values(rng, rng.sample(_PAIRS, facts)).items():
        base = rng.choice(open_ends) if open_ends and rng.random() < 0.5 else ""
        trail[name] = f"{name}={trail[base] if base else value}"
        stated.append(f"{name}={base or value};")
        if trail[name].count("=") < size.hops:
            open_ends.append(name)
    asked = rng.sample(list(trail), steps)
    return "".join(stated), f"find: {' '.join(asked)}", [trail[name] for name in asked]


def _recall(rng: Random, size: Size) -> _Built:
    """Records under two-word keys; most records share a word with others that distract."""
    facts, steps = _counts(rng, size)
    values = _values(rng, rng.sample(_KEYS, facts))
    asked = rng.sample(list(values), steps)
    stated = "".join(f"{key}={value};" for key, value in values.items())
    return stated, f"recall: {','.join(asked)}", [f"{key}={values[key]}" for key in asked]


_BUILDERS: dict[str, Callable[[Random, Size], _Built]] = {
    "sum": _sum,
    "chain": _chain,
    "recall": _recall,
}


def _prose(rng: Random, length: int) -> str:
    """Filler words, cut to exactly `length` bytes."""
    words = rng.choices(_FILLER.split(), k=length // 2 + 1)
    return " ".join(words)[:length].ljust(length, ".")
