"""What planners share: the accuracy and the saving of a map from units to kept channels.

Every model is cut anew from the dense one, so that nothing is left of what was tried before, and accuracy is
remembered by kept counts: rates that keep the same channels are one model.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from strop.core.errors import StropError, quoted
from strop.core.training import Report
from strop.prune.cut import cut, removed
from strop.prune.score import Score, keep, kept_count
from strop.prune.units import Unit, Units

Evaluate = Callable[[nn.Module], float]
"""From a model to its accuracy, 0 to 1: all that a planner sees of data."""
Counts = Mapping[str, int]
"""Channels that stay, by the unit's name; a unit that is not named stays whole."""
SLACK = 1e-9
"""A drop of exactly the tolerance is within it, however the difference was rounded."""


@dataclass(frozen=True)
class Try:
    """One map that was tried."""

    what: str
    """The unit whose rate it varies, or the units that it cuts alike: "all", "blocks"."""
    rate: float
    """Share of the channels that go."""
    accuracy: float
    saving: float
    """Share of the model's parameters that goes."""
    accepted: bool
    """Whether the drop in accuracy was allowed."""

    def __post_init__(self) -> None:
        require_shares(self.rate, self.accuracy, self.saving)


@dataclass(frozen=True)
class Candidate:
    """A map with what it costs and saves."""

    kept: tuple[int, ...]
    """Channels that stay of each unit, in network order."""
    accuracy: float
    saving: float

    def __post_init__(self) -> None:
        require_shares(self.accuracy, self.saving)


class Search:
    """The maps of one model; never changes it. `floor` is the share of a unit that stays at any rate."""

    def __init__(
        self,
        units: Units,
        model: nn.Module,
        evaluate: Evaluate | None,
        score: Score,
        round_to: int = 1,
        floor: float = 0.0,
        report: Report = lambda what, share: None,
    ) -> None:
        self.units, self.model = units, model
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.expected = 1
        """Evaluations that a planner expects, for the progress that is reported."""
        self._evaluate, self._score, self._report = evaluate, score, report
        self._round_to, self._floor = round_to, floor
        self._scores: dict[str, Tensor] = {}
        self._known: dict[tuple[int, ...], float] = {}

    @cached_property
    def free(self) -> tuple[Unit, ...]:
        """The units that planners cut, in network order. Raises StropError where there is none."""
        free = tuple(self.units.free())
        if not free:
            raise StropError(
                f"no channels of this {type(self.model).__name__} can be cut: {_reasons(self.units)}"
            )
        return free

    @property
    def blocks(self) -> tuple[Unit, ...]:
        """Those of them in blocks."""
        return tuple(unit for unit in self.free if unit.where == "block")

    @property
    def evaluations(self) -> int:
        """How often a model was evaluated."""
        return len(self._known)

    @property
    def dense(self) -> float:
        """Accuracy of the model as it is, A0."""
        return self.accuracy({})

    def require_knowledge(self) -> None:
        """Raise StropError where the dense model is right on nothing, so that no cut costs anything."""
        if not self.dense:
            raise StropError(
                "the dense model is right on nothing that `evaluate` asks: give it data it knows"
            )

    def count(self, unit: Unit, rate: float) -> int:
        """Channels of a unit that stay at a rate, above the floor."""
        each = unit.width // unit.heads
        step = unit.step(self._round_to)
        least = min(each, math.ceil(self._floor * each / step - SLACK) * step)
        return max(kept_count(unit.width, rate, unit.heads, step), unit.heads * least)

    def counts(self, units: Iterable[Unit], rate: float) -> dict[str, int]:
        """The same rate for all of `units`."""
        return {unit.name: self.count(unit, rate) for unit in units}

    def saving(self, counts: Counts) -> float:
        """S: the share of all parameters that goes."""
        return removed(self.model, self.units, counts) / self.parameters

    def size(self, unit: Unit) -> int:
        """Parameters that go with all channels of a unit: producers' rows, norms, consumers' columns."""
        return removed(self.model, self.units, {unit.name: 0})

    def scores(self, unit: Unit) -> Tensor:
        """The score of each channel of a unit `[width]`, on the dense model."""
        if unit.name not in self._scores:
            self._scores[unit.name] = self._score(self.model, unit)
        return self._scores[unit.name]

    def kept(self, counts: Counts) -> dict[str, Tensor]:
        """Which channels stay of the units that lose some."""
        return {
            unit.name: keep(self.scores(unit), counts[unit.name], unit.heads)
            for unit in self.units.units
            if counts.get(unit.name, unit.width) < unit.width
        }

    def accuracy(self, counts: Counts) -> float:
        """A: what `evaluate` says of the dense model, cut once. Raises StropError for no accuracy."""
        key = self._key(counts)
        if key not in self._known:
            if self._evaluate is None:
                raise StropError("this method tries what pruning costs: give it `evaluate`, or use uniform")
            self._known[key] = checked(self._evaluate(cut(self.model, self.units, self.kept(counts)).eval()))
            self._report("trying rates", min(1.0, self.evaluations / self.expected))
        return self._known[key]

    def tried(self, what: str, rate: float, counts: Counts, allowed: float) -> Try:
        """Try a map that may lose `allowed` of accuracy."""
        accuracy = self.accuracy(counts)
        accepted = self.dense - accuracy <= allowed + SLACK
        return Try(what, rate, accuracy, self.saving(counts), accepted)

    def frontier(self) -> tuple[Candidate, ...]:
        """All maps that were evaluated but for those that another beats, by saving."""
        names = [unit.name for unit in self.units.units]
        tried = [
            Candidate(kept, accuracy, self.saving(dict(zip(names, kept, strict=True))))
            for kept, accuracy in self._known.items()
        ]
        return frontier(tried)

    def _key(self, counts: Counts) -> tuple[int, ...]:
        return tuple(counts.get(unit.name, unit.width) for unit in self.units.units)


def frontier(tried: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other beats in accuracy or saving without losing in the other, by rising saving."""
    best: list[Candidate] = []
    for one in sorted(tried, key=lambda one: (-one.saving, -one.accuracy, one.kept)):
        if not best or one.accuracy > best[-1].accuracy:
            best.append(one)
    return tuple(best[::-1])


def checked(accuracy: float) -> float:
    """An accuracy as `evaluate` gave it. Raises StropError unless it is a number from 0 to 1."""
    try:
        value = float(accuracy)
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(accuracy).__name__
        raise StropError(f"`evaluate` returns an accuracy from 0 to 1, got a {got}: mend it") from error
    if not 0 <= value <= 1:
        raise StropError(f"`evaluate` returns an accuracy from 0 to 1, got {quoted(value)}: mend it")
    return value


def require_seed(seed: int) -> None:
    """Raise ValueError unless torch takes it."""
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed is a whole number from 0 to {(1 << 63) - 1}, got {seed}")


def require_shares(*values: float) -> None:
    """Raise ValueError unless all values are shares of 1."""
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(f"rates, accuracies and savings are shares from 0 to 1, got {values}")


def _reasons(units: Units) -> str:
    """Why not, shortly."""
    if not units.units:
        return "; ".join(f"{name}: {why}" for name, why in units.frozen[:3]) or "it has no inner widths"
    return f"{units.units[0].name} reads the input or is a residual stream"
