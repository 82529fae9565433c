"""Nonsense that looks like input: values, structures, text and bytes with something changed."""

import copy
import math
from collections.abc import Iterator
from contextlib import suppress
from random import Random
from typing import Any

FAR = ("../../etc/passwd", "/etc/passwd", "/dev/zero", "/proc/self/mem", "~/x", "a/" * 2000, "x" * 5000)
TEXTS = (
    *FAR,
    "",
    "\0",
    "\ud800",
    "\u202e\U0001f4a3",
    "é́",
    "nan",
    "1e999",
    "0x10",
    "null",
    "{{7*7}}",
    "*",
    "a b",
)
NUMBERS = (
    0, -1, 1, 2, 3, 2**31, 2**63, -(2**63), 10**400, 0.0, -0.0, 1.5, 1e308, 5e-324,
    math.nan, math.inf, -math.inf,
)  # fmt: skip
PLAIN = (None, True, False, [], {}, [[]], [None] * 3, {"": None}, {"x": {"y": []}})
LINES = (
    "x: !!python/object/apply:os.system [true]", "a: &a [*a]", "<<: {strop: 1}", "? [1, 2]\n: 3", "strop: 1",
    "\t", "%YAML 9.9", "---", "...", "'", '"', "{", "[" * 400, "- " * 400, "!!binary aGk=", "!!timestamp 1",
    "9" * 5000, "\N{ZERO WIDTH NO-BREAK SPACE}", "\x85", "\u2028", "1:2:3", "0o7", "1_000", "~",
)  # fmt: skip


def junk(chance: Random) -> Any:
    """A value that hardly belongs anywhere."""
    kind = chance.randrange(5)
    if kind == 0:
        return chance.choice(NUMBERS)
    if kind == 1:
        return chance.choice(TEXTS)
    if kind == 2:
        return copy.deepcopy(chance.choice(PLAIN))
    if kind == 3:
        return chance.randrange(-300, 300)
    deep: Any = chance.choice(NUMBERS)
    for _ in range(chance.choice((3, 30, 300))):
        deep = [deep] if chance.random() < 0.5 else {"x": deep}
    return deep


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with every key or index in it."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield value, key
            yield from places(inner)


def spoiled(value: Any, chance: Random, times: int = 3) -> Any:
    """A copy of JSON-like data in which one to `times` things are changed, gone, renamed or moved."""
    root = [copy.deepcopy(value)]
    for _ in range(chance.randint(1, times)):
        known = list(places(root))
        holder, key = known[chance.randrange(len(known))] if chance.random() < 0.97 else (root, 0)
        kind = chance.randrange(6)
        if kind == 0 and holder is not root:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[str(junk(chance))[:9000]] = holder.pop(key)
        elif kind == 2:
            other, place = chance.choice(known)
            holder[key] = copy.deepcopy(other[place]) if other is not root else [holder[key]]
        elif kind == 3 and type(holder[key]) in (int, float):
            with suppress(OverflowError):  # a whole number may be too large for a float
                holder[key] = chance.choice((-1, 2, 1000, 0.5, math.nan)) * holder[key]
        else:
            holder[key] = junk(chance)
    return root[0]


def scribbled(text: str, chance: Random) -> str:
    """Text with one to three places changed: a line of nonsense, a cut, a doubled part, other characters."""
    for _ in range(chance.randint(1, 3)):
        first = chance.randint(0, len(text))
        last = min(len(text), first + chance.choice((0, 1, 5, 50, 5000)))
        line = "\n" + chance.choice(LINES) + "\n"
        new = chance.choice((line, "", text[first:last] * 2, chance.choice(TEXTS), chance.choice(LINES)))
        text = text[:first] + new + text[first if new is line else last :]
    return text


def damaged(raw: bytes, chance: Random, within: int | None = None) -> bytes:
    """Bytes with one to three of the first `within` changed, cut out, put in, or the end cut off."""
    for _ in range(chance.randint(1, 3)):
        place = chance.randint(0, min(within or len(raw), len(raw)))
        before, other = raw[:place], bytes(chance.randrange(256) for _ in range(chance.randrange(1, 20)))
        raw = chance.choice(
            (
                before + other[:1] + raw[place + 1 :],
                before + raw[place + len(other) :],
                before + other + raw[place:],
                before,
                before + b"\xff" * 8 + raw[place + 8 :],
            )
        )
    return raw
