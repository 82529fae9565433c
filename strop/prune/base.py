"""The contract of the `prune` slot: a method says how many channels each unit keeps.

The base finds the units, cuts and evaluates for it, and writes down what was tried. No method changes the
model, or sees data but through `evaluate`. Recovery (`strop.prune.recover`) comes after, reported apart.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from strop.core.method import Method
from strop.core.training import Report
from strop.prune.plan import PrunePlan, Row, fingerprint
from strop.prune.score import by_name
from strop.prune.search import Counts, Evaluate, Search, Try, require_seed
from strop.prune.trace import trace
from strop.prune.units import Example, Unit, Units


def quiet(what: str, share: float) -> None:
    """A report that nobody reads."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a method decided, and what it tried on the way."""

    counts: Counts
    feasible: bool = True
    verdicts: Mapping[str, str] = field(default_factory=dict)
    """A word or a reason on each unit."""
    curves: tuple[Try, ...] = ()
    sensitivity: tuple[Try, ...] = ()
    walk: tuple[Try, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PruneMethod(Method, abc.ABC):
    """Cuts channels of any model with traceable units; members are frozen dataclasses."""

    round_to: int = 1
    """What stays of an axis is a multiple of it, in every head; whole heads go as many as make one."""
    score: str = "l2"
    """What ranks the channels of a unit: "l2", or "random" as a control."""
    seed: int = 0
    """Of all that is drawn by lot."""

    def __post_init__(self) -> None:
        if self.round_to < 1:
            raise ValueError(f"round_to must be 1 or more, got {self.round_to}")
        require_seed(self.seed)
        by_name(self.score, self.seed)

    @property
    def least_share(self) -> float:
        """What stays of each unit at any rate."""
        return 0.0

    @abc.abstractmethod
    def choose(self, search: Search) -> Choice:
        """How many channels stay. Raises StropError where nothing can be cut or accuracy is none."""

    def plan(
        self,
        model: nn.Module,
        evaluate: Evaluate | None = None,
        example: Example | None = None,
        report: Report = quiet,
    ) -> PrunePlan:
        """The plan for a dense `model`, which stays as it is.

        `evaluate` is the only way to data; `example` are keyword inputs of a small forward pass. Raises
        StropError as `choose` does.
        """
        return self.plan_units(trace(model, example), model, evaluate, report)

    def apply(
        self,
        model: nn.Module,
        evaluate: Evaluate | None = None,
        example: Example | None = None,
        report: Report = quiet,
    ) -> nn.Module:
        """Plan, and cut the dense `model` once into a new one."""
        units = trace(model, example)
        return self.plan_units(units, model, evaluate, report).apply(model, units)

    def plan_units(
        self, units: Units, model: nn.Module, evaluate: Evaluate | None = None, report: Report = quiet
    ) -> PrunePlan:
        """As `plan`, with units that are known already."""
        search = self.search(units, model, evaluate, report)
        choice = self.choose(search)
        report("trying rates", 1.0)
        known = evaluate is not None
        return PrunePlan(
            method=type(self).__name__.lower(),
            settings=self.settings(),
            score=self.score,
            seed=self.seed,
            model=fingerprint(model),
            parameters=search.parameters,
            dense_accuracy=search.dense if known else None,
            accuracy=search.accuracy(choice.counts) if known else None,
            saving=search.saving(choice.counts),
            feasible=choice.feasible,
            rows=tuple(_row(search, unit, choice) for unit in units.units),
            frozen=tuple(units.frozen),
            curves=choice.curves,
            sensitivity=choice.sensitivity,
            walk=choice.walk,
            candidates=search.frontier(),
            evaluations=search.evaluations,
        )

    def search(
        self, units: Units, model: nn.Module, evaluate: Evaluate | None = None, report: Report = quiet
    ) -> Search:
        """The maps that this method may try."""
        score = by_name(self.score, self.seed)
        return Search(units, model, evaluate, score, self.round_to, self.least_share, report)


def require_share(name: str, value: float) -> None:
    """Raise ValueError unless a setting is a share of 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a share from 0 to 1, as 0.03 for 3 %, got {value}")


def require_rates(name: str, rates: tuple[float, ...], least: int = 1) -> None:
    """Raise ValueError unless `rates` rise within (0, 1)."""
    rising = list(rates) == sorted(set(rates))
    if len(rates) < least or not rising or not all(0 < rate < 1 for rate in rates):
        raise ValueError(f"{name} takes {least} or more rising rates within (0, 1), got {rates}")


def _row(search: Search, unit: Unit, choice: Choice) -> Row:
    kept = choice.counts.get(unit.name, unit.width)
    return Row(
        name=unit.name,
        width=unit.width,
        heads=unit.heads,
        kept=kept,
        planned=kept,
        parameters=search.size(unit),
        where=unit.where,
        verdict=choice.verdicts.get(unit.name) or _left_whole(unit),
    )


def _left_whole(unit: Unit) -> str:
    """Why no method cuts a unit by itself."""
    if unit.kind == "stream":
        return "a residual stream, cut by hand alone"
    return "reads the model's input, cut by hand alone" if unit.first else ""
