"""How often a token survives an eviction under sampling, beside the bound that VaSE's paper gives.

A token of weight a_i among free candidates of total weight Z survives the draw of m places with probability
1 - (1 - a_i / Z)^m at least (arXiv 2606.03928, section 3.2), for draws without replacement leave it more room
than draws with. A ranking keeps a token surely or never, and what it drops gets no second chance.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from strop.claims.base import Row
from strop.kv import VaSE
from strop.kv.evicting import Candidates, EvictingKV

EDGES = (0.01, 0.03, 0.1, 0.3, 0.6)
"""Where bins of the bound end."""


@dataclass(frozen=True)
class Odds:
    """One eviction under many seeds, for candidates `[B, H_kv, n]`."""

    free: Tensor
    """Those without a reserved place."""
    weight: Tensor
    """Their share of the free weight; 0 for the others."""
    bound: Tensor
    kept: Tensor
    """How often each stayed, 0 to 1."""
    dropped: Tensor
    """Those that a ranking by weight would drop."""


def odds(method: VaSE, candidates: Candidates, draws: int) -> Odds:
    """Tally an eviction under seeds 0, 1, ..., `draws` of them."""
    places = method.budget - method.buffer
    scores = [replace(method, seed=seed).scores(candidates) for seed in range(draws)]
    free = ~scores[0].isposinf()
    weight = method.attention(candidates) * free
    weight = weight / weight.sum(-1, keepdim=True)
    kept = torch.stack([_top(one, places) for one in scores]).float().mean(0)
    drawn = places - method.reserved
    ranked = weight.masked_fill(~free, torch.inf)
    return Odds(free, weight, 1 - (1 - weight) ** drawn, kept, ~_top(ranked, places))


def _top(scores: Tensor, count: int) -> Tensor:
    """Which are the highest, a mask."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter(-1, scores.topk(min(count, scores.shape[-1])).indices, True)


@dataclass(frozen=True, kw_only=True)
class Tallied(EvictingKV):
    """VaSE that hands the odds of every eviction to `hear`."""

    method: VaSE
    draws: int
    hear: Callable[[Odds], None] = field(compare=False)

    @property
    def window(self) -> int:
        return self.method.window

    def scores(self, candidates: Candidates) -> Tensor:
        self.hear(odds(self.method, candidates, self.draws))
        return self.method.scores(candidates)


def summed_up(found: list[Odds], repetitions: int, draws: int) -> list[Row]:
    """Means over evictions, layers, heads and the rows of a repetition; then over all, by bins of the bound.

    `broken` is the share of free tokens kept less often than the bound by over three standard errors;
    `second_chance` the part of the weight that a ranking drops which sampling keeps, `dropped` that weight.
    """
    measures: dict[str, list[float]] = {"broken": [], "dropped": [], "second_chance": []}
    for rows in torch.arange(len(found[0].free)).chunk(repetitions):
        bound, kept, weight, dropped = _free(found, rows)
        error = (bound * (1 - bound) / draws).sqrt()
        lost = weight[dropped].sum()
        measures["broken"].append(float((kept < bound - 3 * error).float().mean()))
        measures["dropped"].append(float(lost / weight.sum()))
        measures["second_chance"].append(float((kept * weight)[dropped].sum() / lost))
    head = {"study": "retention", "model": "zoo:reasoner", "method": "AttnV"}
    bound, kept, *_ = _free(found, torch.arange(len(found[0].free)))
    bins = torch.bucketize(bound, torch.tensor(EDGES, device=bound.device))
    return [{**head, "bound_from": None, **measures}] + [
        {**head, "bound_from": low, "bound": float(bound[here].mean()), "kept": float(kept[here].mean())}
        for number, low in enumerate((0.0, *EDGES))
        if (here := bins == number).any()
    ]


def _free(found: list[Odds], rows: Tensor) -> list[Tensor]:
    """Bound, kept, weight and dropped of all free tokens of some rows, `[n]` each."""
    return [
        torch.cat([getattr(one, name)[rows][one.free[rows]] for one in found])
        for name in ("bound", "kept", "weight", "dropped")
    ]
