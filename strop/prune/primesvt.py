"""PrimeSVT: the largest unit first, each pruned as far as the accuracy asked for allows (arXiv 2606.03428).

1. Sort the units by the parameters that go with them.
2. Cut each alone at every rate: targets are those that tolerate a rate at which they are worth it.
3. Commit target after target at the largest rate with which the whole stays within the tolerance, until the
   saving asked for is met; then take the last one back to the smallest rate that still meets it.
Differs from the paper, whose rates, thresholds and scores are not public: they are settings here, as are
order and reserve. Of units of one size the more robust comes first. Every rate is tried, since accuracy is
not monotone; fewer `rates` make it cheaper.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from strop.core.sampling import keyed_uniform
from strop.core.words import percent, share
from strop.prune.base import Choice, PruneMethod, require_rates, require_share
from strop.prune.search import Search, Try
from strop.prune.units import Unit

MODES = ("meet", "maximise")
ORDERS = ("size", "benefit", "robust", "smallest", "random")
TARGET = "target"
Counts = dict[str, int]


@dataclass(frozen=True)
class PrimeSVT(PruneMethod):
    """Meets a saving within a tolerance, or says that it does not."""

    epsilon: float = 0.03
    """What accuracy may lose on the data of `evaluate`."""
    saving: float = 0.25
    """S*: the share of the parameters to be saved."""
    mode: str = "meet"
    """"meet" saves what was asked for; "maximise" goes on through all targets."""
    order: str = "size"
    """Who comes first: "size" (the largest: the paper's), "benefit", "robust", or a control, "smallest" and
    "random"."""
    reserve: float = 0.0
    """Share of the tolerance that is kept for the units to come, all of them together."""
    rates: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """What is tried."""
    least: float = 0.01
    """A unit that saves less of the model than this, alone, stays whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epsilon", "saving", "reserve", "least"):
            require_share(name, getattr(self, name))
        require_rates("rates", self.rates)
        for name, known in (("mode", MODES), ("order", ORDERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def choose(self, search: Search) -> Choice:
        """Profile, sort, commit, select."""
        worth = [unit for unit in search.free if self.most(search, unit) >= self.least]
        search.expected = 1 + len(worth) * (len(self.rates) + 3)
        search.require_knowledge()
        alone = {unit.name: [*self.tried(search, {}, unit, self.rates, self.epsilon)] for unit in worth}
        verdicts = {unit.name: self.verdict(search, unit, alone.get(unit.name, ())) for unit in search.free}
        targets = [unit for unit in worth if verdicts[unit.name] == TARGET]
        targets.sort(key=lambda unit: self.position(search, unit, alone[unit.name]))
        walk, committed = self.commit(search, targets, alone)
        counts, feasible = self.select(search, committed)
        sensitivity = tuple(one for tries in alone.values() for one in tries)
        return Choice(counts=counts, feasible=feasible, verdicts=verdicts, sensitivity=sensitivity, walk=walk)

    def most(self, search: Search, unit: Unit) -> float:
        """What a unit saves at the largest rate."""
        return search.saving(search.counts([unit], self.rates[-1]))

    def tried(
        self, search: Search, counts: Counts, unit: Unit, rates: Iterable[float], allowed: float
    ) -> Iterator[Try]:
        """A unit at each of `rates`, on top of what is committed."""
        for rate in rates:
            yield search.tried(unit.name, rate, counts | search.counts([unit], rate), allowed)

    def until_accepted(self, tries: Iterable[Try]) -> list[Try]:
        """All up to the first that is accepted; the rest is not tried."""
        seen = []
        for one in tries:
            seen.append(one)
            if one.accepted:
                break
        return seen

    def verdict(self, search: Search, unit: Unit, alone: Sequence[Try]) -> str:
        """Whether a unit is a target, or why not."""
        accepted = [one for one in alone if one.accepted]
        if not alone:
            return f"saves {percent(self.most(search, unit))} at most, below {share(self.least)}"
        if not accepted:
            return f"tolerates no rate of {share(self.rates[0])} or more alone"
        if accepted[-1].saving < self.least:
            return f"saves {percent(accepted[-1].saving)} within the tolerance, below {share(self.least)}"
        return TARGET

    def position(self, search: Search, unit: Unit, alone: Sequence[Try]) -> tuple[float, ...]:
        """What targets are sorted by, ascending; those alike stay in network order."""
        size = search.size(unit)
        robustness = fmean(one.accuracy / search.dense for one in alone)
        benefit = max(one.accuracy / search.dense * one.saving for one in alone)
        lot = float(keyed_uniform(1, self.seed, "order", unit.name))
        keys: dict[str, tuple[float, ...]] = {
            "size": (-size, -robustness),
            "benefit": (-benefit,),
            "robust": (-robustness,),
            "smallest": (size, -robustness),
            "random": (lot,),
        }
        return keys[self.order]

    def commit(
        self, search: Search, targets: Sequence[Unit], alone: Mapping[str, Sequence[Try]]
    ) -> tuple[tuple[Try, ...], list[Counts]]:
        """Every step, and every map that was committed, the first of them empty."""
        walk: list[Try] = []
        committed: list[Counts] = [{}]
        total = left = sum(search.size(unit) for unit in targets)
        for unit in targets:
            left -= search.size(unit)
            allowed = self.epsilon * (1 - self.reserve * left / total)
            tolerated = max(one.rate for one in alone[unit.name] if one.accepted)
            before, rates = committed[-1], [rate for rate in self.rates if rate <= tolerated]
            down = self.until_accepted(self.tried(search, before, unit, rates[::-1], allowed))
            walk += down
            if not down[-1].accepted:
                continue
            committed.append(before | search.counts([unit], down[-1].rate))
            if self.mode == "meet" and self.met(search, committed[-1]):
                maps = {rate: before | search.counts([unit], rate) for rate in rates if rate < down[-1].rate}
                smaller = [rate for rate, counts in maps.items() if self.met(search, counts)]
                back = self.until_accepted(self.tried(search, before, unit, smaller, allowed))
                walk += back
                committed += [maps[one.rate] for one in back if one.accepted]
                break
        return tuple(walk), committed

    def met(self, search: Search, counts: Counts) -> bool:
        """Whether a map saves enough."""
        return search.saving(counts) >= self.saving

    def select(self, search: Search, committed: Sequence[Counts]) -> tuple[Counts, bool]:
        """The best of what was committed, all of it tolerated, and whether it meets the saving.

        To meet it: the highest accuracy, then the fewest channels gone. Otherwise the largest saving.
        """
        enough = [counts for counts in committed if self.met(search, counts)]
        if enough and self.mode == "meet":
            return max(enough, key=lambda counts: (search.accuracy(counts), -search.saving(counts))), True
        best = max(committed, key=lambda counts: (search.saving(counts), search.accuracy(counts)))
        return best, bool(enough)
