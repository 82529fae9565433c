"""PSViT: a rate that all blocks tolerate, then finer ones, the most robust units first (arXiv 2606.03257).

1. Cut all units alike, and those in blocks alone; the largest rate of the latter within the tolerance is r0.
2. Cut each unit alone, which tells how much accuracy a saved parameter costs there.
3. Start the blocks at r0 and raise one unit after the other while the whole stays within the tolerance.
Differs from the paper, whose grid of rates and thresholds are not public: both are settings here. A model
that tolerates r0 but not r0 without its sensitive units (accuracy is not monotone) starts at plain r0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from strop.prune.base import Choice, PruneMethod, require_rates, require_share
from strop.prune.search import SLACK, Search, Try
from strop.prune.units import Unit

SENSITIVE, MODERATE, ROBUST = "sensitive", "moderate", "robust"
Rates = dict[str, float]
"""By unit."""


@dataclass(frozen=True)
class PSViT(PruneMethod):
    """Walks to the tolerance, or until `saving` is met."""

    tolerance: float = 0.03
    """epsilon: what accuracy may lose on the data of `evaluate`."""
    step: float = 0.1
    """Between rates."""
    probe: tuple[float, ...] = (0.3, 0.6, 0.9)
    """Rates at which units are cut alone: the first finds sensitive ones, the second robust ones."""
    floor: float = 0.1
    """Share of its channels that each unit keeps."""
    saving: float | None = None
    """Share of the parameters that is enough; None saves what the tolerance allows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("tolerance", self.tolerance)
        require_share("floor", self.floor)
        require_share("saving", self.saving or 0.0)
        require_rates("probe", self.probe, least=2)
        require_rates("step", (self.step,))
        if not self.rates:
            raise ValueError(f"a step of {self.step} goes below a floor of {self.floor}: lower one of them")

    @property
    def least_share(self) -> float:
        return self.floor

    @property
    def rates(self) -> tuple[float, ...]:
        """step, 2 step, ... down to the floor."""
        most = math.floor((1 - self.floor) / self.step + SLACK)
        return tuple(rate for k in range(1, most + 1) if (rate := round(k * self.step, 10)) < 1)

    def choose(self, search: Search) -> Choice:
        """Uniform rates, sensitivity of each unit, and the walk from the first to the last."""
        free, blocks = search.free, search.blocks
        search.expected = 1 + 3 * len(free) * len(self.probe) + 2 * len(self.rates)
        search.require_knowledge()
        every, alike = self.sweep(search, "all", free), self.sweep(search, "blocks", blocks)
        alone = {unit.name: self.alone(search, unit) for unit in free}
        verdicts = {name: self.verdict(search, tries) for name, tries in alone.items()}
        by_damage = sorted(free, key=lambda unit: self.damage(search, alone[unit.name]))
        walk, rates = self.walk(search, by_damage, self.start(search, blocks, alike, verdicts))
        counts = self.counts(search, rates)
        return Choice(
            counts=counts,
            feasible=self.saving is None or search.saving(counts) >= self.saving,
            verdicts=verdicts,
            curves=every + alike,
            sensitivity=tuple(one for tries in alone.values() for one in tries),
            walk=walk,
        )

    def sweep(self, search: Search, what: str, units: Sequence[Unit]) -> tuple[Try, ...]:
        """All of `units` cut alike, at every rate."""
        if not units:
            return ()
        return tuple(
            search.tried(what, rate, search.counts(units, rate), self.tolerance) for rate in self.rates
        )

    def alone(self, search: Search, unit: Unit) -> tuple[Try, ...]:
        """One unit cut at the rates of `probe`."""
        return tuple(
            search.tried(unit.name, rate, search.counts([unit], rate), self.tolerance) for rate in self.probe
        )

    def verdict(self, search: Search, alone: Sequence[Try]) -> str:
        """Sensitive above the tolerance at the first rate, robust below half of it at the second."""
        low, middle = (search.dense - one.accuracy for one in alone[:2])
        if low > self.tolerance + SLACK:
            return SENSITIVE
        return ROBUST if middle <= self.tolerance / 2 + SLACK else MODERATE

    def damage(self, search: Search, alone: Sequence[Try]) -> float:
        """d(u): accuracy that a saved share of the parameters costs, (max(0, dA) + 0.001) / dS."""
        middle = alone[1]
        lost = max(0.0, search.dense - middle.accuracy) + 0.001
        return lost / middle.saving if middle.saving else math.inf

    def start(
        self, search: Search, blocks: Sequence[Unit], alike: Sequence[Try], verdicts: dict[str, str]
    ) -> Rates:
        """The units in blocks at r0 but for sensitive ones, where that too is tolerated."""
        tolerated = [one for one in alike if one.accepted]
        enough = [one for one in tolerated if self.saving is not None and one.saving >= self.saving]
        rate = enough[0].rate if enough else tolerated[-1].rate if tolerated else 0.0
        uniform = {unit.name: rate for unit in blocks}
        spared = {name: rate for name, rate in uniform.items() if verdicts[name] != SENSITIVE}
        lost = search.dense - search.accuracy(self.counts(search, spared))
        return spared if lost <= self.tolerance + SLACK else uniform

    def walk(self, search: Search, units: Sequence[Unit], rates: Rates) -> tuple[tuple[Try, ...], Rates]:
        """Raise unit after unit, step by step, until the tolerance or the floor; the steps and the rates."""
        steps: list[Try] = []
        rates = dict(rates)
        for unit in units:
            for rate in self.rates:
                if self._enough(search, rates):
                    return tuple(steps), rates
                if rate <= rates.get(unit.name, 0.0):
                    continue
                raised = rates | {unit.name: rate}
                steps.append(search.tried(unit.name, rate, self.counts(search, raised), self.tolerance))
                if not steps[-1].accepted:
                    break
                rates = raised
        return tuple(steps), rates

    def counts(self, search: Search, rates: Rates) -> dict[str, int]:
        """Kept counts of a map of rates."""
        return {unit.name: search.count(unit, rates[unit.name]) for unit in search.free if unit.name in rates}

    def _enough(self, search: Search, rates: Rates) -> bool:
        return self.saving is not None and search.saving(self.counts(search, rates)) >= self.saving
