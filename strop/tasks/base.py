"""The contract of a task: a list of examples, and one rule for when an output is right.

An `Example` is plain text, so a task needs no tensor library and no tokenizer, and any causal
language model can be put to it: generate from `prompt`, then ask `is_right` of the completion.
"""

from __future__ import annotations

from collections.abc import Callable
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
