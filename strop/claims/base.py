"""A claim: what a paper says, what was measured here, and the verdict.

A claim never passes or fails a test: its experiment runs, is deterministic, its controls behave, and
whichever way the answer falls is printed.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from strop.core.intervals import bootstrap

Row = dict[str, Any]
"""What one measurement found: names, settings, and lists of one value a repetition."""

VERDICTS = ("reproduced", "partly", "not here", "needs a GPU")

Report = Callable[[str, float], None]
"""Called with what is being measured and the share done, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One hypothesis of a paper after its experiment."""

    paper: str
    """Key of the paper, such as "kvarn"."""
    claim: str
    """The hypothesis in one sentence."""
    paper_value: str
    """What the paper reports."""
    measured: str
    """What was measured here, in the same unit."""
    interval: tuple[float, float] | None
    """95 % interval of the measured value over `seeds`."""
    seeds: int
    """Independent repetitions."""
    varied: str
    """What differs between repetitions (data, initialisation, ...)."""
    verdict: str
    """One of VERDICTS."""
    reason: str
    """Why this verdict, with the regime."""
    scale: str
    """"cpu" or "gpu"."""
    seconds: float
    """What its experiment took; claims that rest on one experiment share it."""
    details: tuple[dict[str, Any], ...] = ()
    """The tables behind the verdict, a flat dict a row; lists hold one value a repetition."""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {VERDICTS}, got {self.verdict!r}")

    def to_dict(self) -> dict[str, Any]:
        """The claim as JSON."""
        return dataclasses.asdict(self)


MEASURED_BY_MAKE = "needs a CUDA device: `make gpu` measures it, docs/gpu.md tells"


def on_a_gpu(paper: str, scale: str, said: Mapping[str, str], reason: str = MEASURED_BY_MAKE) -> list[Claim]:
    """Claims about time and memory of large models: what a paper says, by claim, unmeasured here."""
    return [
        Claim(
            paper=paper,
            claim=claim,
            paper_value=value,
            measured="not measured",
            interval=None,
            seeds=0,
            varied="nothing",
            verdict="needs a GPU",
            reason=reason,
            scale=scale,
            seconds=0.0,
        )
        for claim, value in said.items()
    ]


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    _, low, high = bootstrap(np.asarray(values, dtype=float), lambda sample: sample.mean(1), seed)
    return low, high


def ratio(over: Sequence[float], under: Sequence[float], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Ratio of the sums of paired values, and its 95 % bootstrap interval over the pairs."""

    def of(sample: np.ndarray) -> np.ndarray:
        sums = np.maximum(sample.sum(1), 1e-30)
        return sums[:, 0] / sums[:, 1]

    mean, low, high = bootstrap(np.array([over, under], dtype=float).T, of, seed)
    return mean, (low, high)


@dataclass(frozen=True)
class Table:
    """The rows of one experiment, and what it took."""

    rows: list[Row]
    seconds: float

    def where(self, **wanted: Any) -> list[Row]:
        """The rows that are as said; a tuple lists what will do."""
        return [row for row in self.rows if all(_will_do(row.get(key), will) for key, will in wanted.items())]

    def pick(self, measure: str, **wanted: Any) -> Any:
        """One measure of the only row that is as said."""
        (row,) = self.where(**wanted)
        return row[measure]

    def claim(self, rows: Sequence[Row], **fields: Any) -> Claim:
        """A claim that rests on this experiment; `rows` are its details."""
        return Claim(seconds=round(self.seconds, 1), details=tuple(cut(row) for row in rows), **fields)


Tables = dict[str, Table]
"""By experiment."""


def measured(experiment: str, study: Callable[[], list[Row]]) -> Tables:
    """The table of one experiment, with what it took."""
    start = time.perf_counter()
    rows = study()
    return {experiment: Table(rows, time.perf_counter() - start)}


class Progress:
    """Turns measurements begun into the share done."""

    def __init__(self, report: Report, expected: int) -> None:
        self.report, self.expected, self.begun = report, expected, 0

    def __call__(self, what: str) -> None:
        self.report(what, min(self.begun / self.expected, 1.0))
        self.begun += 1


@dataclass(frozen=True)
class Part:
    """What can be measured apart from the rest of a paper: an experiment on one model, say."""

    name: str
    steps: int
    """Measurements that it announces."""
    study: Callable[[Any, Progress], Tables]
    """Measures, given what the paper's experiments run on."""
    timed: bool = False
    """Whether seconds are what it measures, so that nothing may run beside it."""


def part(
    experiment: str,
    of: str,
    steps: int,
    study: Callable[[Any, Progress], list[Row]],
    timed: bool = False,
) -> Part:
    """A part of one experiment."""
    name = f"{experiment}, {of}" if of else experiment
    return Part(name, steps, lambda bed, progress: measured(experiment, lambda: study(bed, progress)), timed)


def joined(found: Iterable[Tables]) -> Tables:
    """The tables of parts as one: rows in the order of the parts, and the seconds of all."""
    tables: Tables = {}
    for one in found:
        for name, table in one.items():
            before = tables.get(name, Table([], 0.0))
            tables[name] = Table([*before.rows, *table.rows], before.seconds + table.seconds)
    return tables


@dataclass(frozen=True, kw_only=True)
class Paper:
    """How the claims of a paper are measured."""

    scales: Mapping[str, Any]
    """How large the experiments are, by name."""
    lay: Callable[[Any, Progress], Any]
    """What the experiments of a scale run on."""
    laying: int
    """Measurements that `lay` announces."""
    parts: Callable[[Any], list[Part]]
    """The experiments of a scale."""
    verdicts: Callable[[Tables, Any], list[Claim]]
    """Every hypothesis against the tables."""


def beside(one: Paper, other: Paper) -> Paper:
    """Two sides of a paper as one: scales and beds in pairs, the experiments and claims of both in order.

    Names of parts and of experiments must differ between the sides, and both have the same scales.
    """
    sides = one, other

    def on(number: int, found: Part) -> Part:
        return dataclasses.replace(found, study=lambda beds, progress: found.study(beds[number], progress))

    return Paper(
        scales={name: (size, other.scales[name]) for name, size in one.scales.items()},
        lay=lambda sizes, progress: tuple(
            side.lay(size, progress) for side, size in zip(sides, sizes, strict=True)
        ),
        laying=one.laying + other.laying,
        parts=lambda sizes: [
            on(number, found) for number, side in enumerate(sides) for found in side.parts(sizes[number])
        ],
        verdicts=lambda tables, sizes: [
            claim for side, size in zip(sides, sizes, strict=True) for claim in side.verdicts(tables, size)
        ],
    )


def _will_do(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def graded(all_of: Iterable[bool], any_of: Iterable[bool]) -> str:
    """The verdict "reproduced" when all hold, "partly" when any of the weaker ones does, else "not here"."""
    if all(all_of):
        return "reproduced"
    return "partly" if any(any_of) else "not here"


def cut(value: Any) -> Any:
    """Rows and lists with their numbers at five digits."""
    if isinstance(value, dict):
        return {key: cut(item) for key, item in value.items()}
    if isinstance(value, list):
        return [cut(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def listed(means: Mapping[str, float], form: str = "{:.2f}") -> str:
    """Named numbers in one line."""
    return ", ".join(f"{name} {form.format(value)}" for name, value in means.items())
