"""What traces are made of: a row of a file before it is a job, checks of its fields, chained block ids."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from strop.core.errors import StropError, quoted
from strop.serve.base import Trace

MAX_BYTES = 256 << 20
MAX_ROWS = 2_000_000
MAX_TOKENS = 1 << 24
MAX_SECONDS = 10**10
EXTREME = 1e9
"""The largest rate, and one over the smallest."""
MAX_ID = 1 << 63
"""The first number that is too large for the hash of a block."""


class Row(NamedTuple):
    """One line of a file."""

    time: float
    """Ticks of the loader, from any origin."""
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class FileTrace(Trace):
    """A trace that was read, and what was left out of it."""

    skipped: int = 0
    """Rows that were bad and passed over."""
    refusal: str = ""
    """What was wrong with the first of them."""


class Loader(ABC):
    """One format of files. Knows single rows; what rows mean to one another is the reader's matter."""

    per_second: ClassVar[int]
    """Ticks a second."""

    @abstractmethod
    def row(self, line: str) -> Row:
        """Parse a line that is not blank. Raises StropError with what is wrong in it, without the place."""


class Blocks:
    """Numbers blocks such that an id names a block and all before it: the same id, the same prefix."""

    def __init__(self, block: int) -> None:
        self.block = block
        self._next = 0

    def grow(self, before: tuple[int, ...], known: int, tokens: int) -> tuple[int, ...]:
        """Ids of a prompt of `tokens` whose first `known` are those of the sequence with the ids `before`.

        Filled blocks keep their ids; one that was partly filled gets a new one, since its content changes.
        """
        kept = min(known, tokens) // self.block
        start = self._next
        self._next += -(-tokens // self.block) - kept
        return (*before[:kept], *range(start, self._next))


def check(trace: Trace) -> None:
    """Raise ValueError unless an id has one place and one id before it, and prompts have all of theirs."""
    known: dict[int, tuple[int, int]] = {}
    for job in trace.all():
        ids = job.request.blocks
        if ids and len(ids) != -(-job.request.prompt // trace.block):
            raise ValueError(
                f"request {job.request.id} has {len(ids)} blocks for {job.request.prompt} tokens"
            )
        for index, (id, before) in enumerate(zip(ids, (-1, *ids), strict=False)):
            if known.setdefault(id, (index, before)) != (index, before):
                raise ValueError(f"block {id} of request {job.request.id} is elsewhere in another")


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number within bounds. Raises StropError."""
    if type(value) is not int or not least <= value <= most:
        raise StropError(f"{name} must be a whole number from {least} to {most}, not {quoted(value)}")
    return value


def seconds(name: str, value: Any, per_second: int) -> float:
    """A time in ticks that is finite and not negative. Raises StropError."""
    if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS * per_second:
        raise StropError(f"{name} must be a number from 0 to {MAX_SECONDS * per_second}, not {quoted(value)}")
    return value


def positive(name: str, value: Any) -> float:
    """A setting that must be a number above 0, of a size that arithmetic bears. Raises StropError."""
    if not isinstance(value, int | float) or not 1 / EXTREME <= value <= EXTREME:
        raise StropError(f"{name} must be a number from {1 / EXTREME:g} to {EXTREME:g}, not {quoted(value)}")
    return value


def count(name: str, value: Any, most: int = MAX_ROWS) -> int:
    """A setting that counts something. Raises StropError."""
    return whole(name, value, 1, most)


def stream(seed: int, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose, of which a longer trace draws more and no others. Raises StropError."""
    whole("seed", seed, 0, MAX_ID - 1)
    return np.random.default_rng([seed, *purpose.encode()])


def waits(rng: np.random.Generator, mean: float, cv: float, number: int) -> np.ndarray:
    """Gamma-distributed times `[number]` of a mean and a coefficient of variation."""
    return rng.gamma(cv**-2, mean * cv**2, number)
