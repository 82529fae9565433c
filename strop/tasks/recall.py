"""Passkey-style recall: a key planted at some depth of a long text, asked for at its end.

The key is a line of code, `PASSKEY_QXB = 48213`, and the prompt ends with the same left-hand side,
`PASSKEY_QXB =`, so that any causal model which can copy from its context can answer, tuned to
follow instructions or not. Other keys, planted elsewhere, keep a model from answering with
whatever number it last saw. Any text serves as filler; source code suits the form best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from strop.core.errors import StropError
from strop.tasks.base import Example

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def draw_keys(rng: Random, count: int) -> dict[str, str]:
    """`count` distinct names, each with five digits: `{"PASSKEY_QXB": "48213", ...}`."""
    keys: dict[str, str] = {}
    while len(keys) < count:
        keys["PASSKEY_" + "".join(rng.choices(_LETTERS, k=3))] = f"{rng.randrange(10**5):05d}"
    return keys


def plant(lines: Sequence[str], keys: dict[str, str], depths: Sequence[float]) -> str:
    """Filler lines (each ending in a newline) with every key's assignment at its depth, 0 to 1."""
    at = [round(depth * len(lines)) for depth in depths]
    order = sorted(zip(at, keys.items(), strict=True), key=lambda item: item[0])
    parts, done = [], 0
    for position, (name, digits) in order:
        parts += [*lines[done:position], f"{name} = {digits}\n"]
        done = position
    return "".join([*parts, *lines[done:]])


def window(rng: Random, texts: Sequence[str], length: int, count_tokens: Callable[[str], int]) -> list[str]:
    """Consecutive lines from a random place, about `length` tokens in all, text after text."""
    at = rng.randrange(len(texts))
    lines = texts[at].splitlines(keepends=True)
    begin = rng.randrange(max(1, len(lines)))
    taken: list[str] = []
    used = 0
    while used < length:
        if begin >= len(lines):
            at, begin = (at + 1) % len(texts), 0
            lines = texts[at].splitlines(keepends=True) or ["\n"]
        line = lines[begin].rstrip("\r\n") + "\n"
        begin += 1
        used += count_tokens(line)
        taken.append(line)
    return taken


def passkeys(
    filler: Sequence[str] | str,
    count: int,
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    length: int = 1500,
    count_tokens: Callable[[str], int] = len,
    distractors: int = 2,
    seed: int = 0,
) -> list[tuple[float, Example]]:
    """`count` prompts a depth, as (depth, example); the answer is the planted key's five digits.

    A prompt holds about `length` tokens of filler as `count_tokens` counts them (default:
    characters); at depth 0.1 a tenth of its lines stand before the key. The distractors' depths are
    random. An answer is right when the completion's first five digits are it: see `first_digits`.
    """
    texts = [t for t in ([filler] if isinstance(filler, str) else filler) if t.strip()]
    if not texts:
        raise StropError("The filler is empty; pass at least one text with a line in it.")
    if length < 1 or any(not 0 <= depth <= 1 for depth in depths):
        raise StropError("Recall needs a length of at least 1 and depths between 0 and 1.")
    found = []
    for depth in depths:
        for index in range(count):
            rng = Random(f"{seed}/{depth}/{index}")
            lines = window(rng, texts, length, count_tokens)
            keys = draw_keys(rng, 1 + distractors)
            name, digits = next(iter(keys.items()))
            at = [depth, *(rng.random() for _ in range(distractors))]
            prompt = plant(lines, keys, at) + f"{name} ="
            found.append((depth, Example(prompt, digits, f" {digits}\n")))
    return found


def first_digits(completion: str) -> str | None:
    """The first five characters of a completion, spaces aside, when all are digits."""
    head = completion.strip()[:5]
    return head if len(head) == 5 and head.isdigit() else None
