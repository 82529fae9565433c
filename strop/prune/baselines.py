"""What a planner has to beat: one rate for all, channels by lot, one ranking of all channels, masks.

The methods here need no evaluation. Channels by lot are any method with `score="random"`. Masks of single
weights save no bytes: the tensors stay as large as they were.
"""

import copy
import dataclasses
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strop.core.errors import StropError
from strop.core.words import percent, share
from strop.prune.base import Choice, PruneMethod, require_rates, require_share
from strop.prune.search import Search
from strop.prune.units import Unit, Units

WHERE = ("blocks", "all")
FINE = 1000
"""Rates that are told apart when a saving is to be matched."""


@dataclass(frozen=True)
class Uniform(PruneMethod):
    """The same rate everywhere."""

    rate: float = 0.5
    """Share of the channels that go."""
    where: str = "blocks"
    """Units in "blocks", or "all" units that planners may cut."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rates("rate", (self.rate,))
        _require_place(self.where)

    def choose(self, search: Search) -> Choice:
        """The rate for every unit that is meant. Raises StropError where there is none."""
        return Choice(counts=search.counts(_meant(search, self.where), self.rate))

    def matching(self, saving: float, units: Units, model: nn.Module) -> "Uniform":
        """The same at the smallest rate, in thousandths, that saves as much.

        Raises StropError where none does.
        """
        search = self.search(units, model)

        def at(thousandths: int) -> Uniform:
            return dataclasses.replace(self, rate=thousandths / FINE)

        def saved(thousandths: int) -> float:
            return search.saving(at(thousandths).choose(search).counts)

        found = 1 + bisect_left(range(1, FINE), saving, key=saved)
        if found == FINE:
            raise _too_much(saving, saved(FINE - 1))
        return at(found)


@dataclass(frozen=True)
class GlobalRanking(PruneMethod):
    """The channels of least score go first, whichever unit they are of, until the saving is met.

    Scores of wide and of narrow layers are compared as they are, which makes it a baseline. A step goes to
    the next multiple of `round_to` in every head of a unit.
    """

    saving: float = 0.25
    """Share of the parameters that goes."""
    where: str = "all"
    """All units that planners may cut, or those in "blocks"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("saving", self.saving)
        _require_place(self.where)

    def choose(self, search: Search) -> Choice:
        """The shortest run of steps that saves enough. Raises StropError where all of them do not."""
        steps = [
            step for unit in _meant(search, self.where) for step in self.steps(unit, search.scores(unit))
        ]
        steps.sort(key=lambda step: step[0])

        def counts(taken: int) -> dict[str, int]:
            return {name: stay for _, name, stay in steps[:taken]}

        taken = bisect_left(range(len(steps) + 1), self.saving, key=lambda n: search.saving(counts(n)))
        if taken > len(steps):
            raise _too_much(self.saving, search.saving(counts(len(steps))))
        return Choice(counts=counts(taken))

    def steps(self, unit: Unit, scores: Tensor) -> list[tuple[float, str, int]]:
        """Mean score of the channels that go with each step, the unit, and how many of it stay then."""
        ranked = scores.reshape(unit.heads, -1).sort(dim=1).values
        before = each = ranked.shape[1]
        found = []
        step = unit.step(self.round_to)
        for stay in range(each - (each % step or step), 0, -step):
            mean = float(ranked[:, each - before : each - stay].mean())
            found.append((mean, unit.name, unit.heads * stay))
            before = stay
        return found


def _require_place(where: str) -> None:
    if where not in WHERE:
        raise ValueError(f"where must be one of {', '.join(WHERE)}, got {where!r}")


def _meant(search: Search, where: str) -> Sequence[Unit]:
    """The units of a place. Raises StropError where there are none."""
    units = search.free if where == "all" else search.blocks
    if not units:
        raise StropError('no channels in blocks can be cut: use where="all"')
    return units


@torch.no_grad()
def magnitude_masked(model: nn.Module, sparsity: float) -> nn.Module:
    """A copy in which the smallest weights are zero, as many as that share of all its parameters.

    All matrices and filters are ranked together; biases and norms stay. Raises StropError for a share that is
    none, or larger than the matrices.
    """
    weights = [weight for weight in model.parameters() if weight.dim() > 1]
    sizes = [weight.numel() for weight in weights]
    total = sum(parameter.numel() for parameter in model.parameters())
    zeros = round(sparsity * total)
    if not 0 <= zeros <= sum(sizes):
        raise _too_much(sparsity, sum(sizes) / total)
    smallest = torch.cat([weight.abs().float().flatten() for weight in weights]).argsort(stable=True)[:zeros]
    stays = torch.ones(sum(sizes), dtype=torch.bool, device=smallest.device)
    stays[smallest] = False
    masks = zip(weights, stays.split(sizes), strict=True)
    zeroed = {id(w): nn.Parameter(w * mask.reshape(w.shape), w.requires_grad) for w, mask in masks}
    others = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, others | zeroed)


def _too_much(asked: float, most: float) -> StropError:
    return StropError(f"a share of {share(asked)} cannot go: {percent(most)} is the most; ask for less")
