"""The contract of a task: a list of examples, and one rule for when an output is right.

An `Example` is plain text, so a task needs no tensor library and no tokenizer, and any causal
language model can be put to it: generate from `prompt`, then `exact_match` the completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One prompt with what is known about its continuation."""

    prompt: str
    answer: str | None = None
    """Exact-match target: compared after `strip()` with what `extract` finds in the completion."""
    solution: str | None = None
    """The full worked continuation, when known; `prompt + solution` is a teacher-forced text."""


def is_right(example: Example, completion: str, extract: Callable[[str], str | None] = str.strip) -> bool:
    """Whether what `extract` finds in `completion` is the example's answer, spaces aside."""
    found = extract(completion)
    return found is not None and example.answer is not None and found.strip() == example.answer


def exact_match(
    examples: Sequence[Example],
    completions: Sequence[str],
    extract: Callable[[str], str | None] = str.strip,
) -> float:
    """Fraction of examples, 0 to 1, whose completion holds the right answer; 0 of none is 0."""
    right = sum(is_right(e, c, extract) for e, c in zip(examples, completions, strict=True))
    return right / max(len(examples), 1)
