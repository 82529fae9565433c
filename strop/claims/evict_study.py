"""Exact match of worked problems whose solution is written through a cache that evicts.

Prompts are read once, in full; every policy takes over what was read, and the first step that it makes due
cuts it. All problems of a regime have one length, so rows need no padding and are cut together.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from strop.audit.quality import common_prefix
from strop.claims.accuracy import Prompted, read_prompts, right, solve
from strop.claims.base import Row
from strop.claims.evict_policies import SELECTION, Selection, policies
from strop.kv import SnapKV
from strop.kv.evicting import EvictingKV
from strop.model import Model
from strop.tasks.base import Example
from strop.tasks.reasoning import Size, problems

FULL = "full cache"


@dataclass(frozen=True, kw_only=True)
class Regime:
    """Problems of one length, and the budgets that they are solved at."""

    name: str
    facts: int
    look_ups: int
    lead: int
    gap: int
    budgets: tuple[int, ...]

    @property
    def middle(self) -> int:
        """The budget of experiments that take one only."""
        return self.budgets[len(self.budgets) // 2]

    def examples(self, sets: int, each: int) -> list[Example]:
        """`sets * each` held-out `sum` problems, those of a set side by side."""
        spans = [(n, n) for n in (self.facts, self.look_ups, self.lead, self.gap)]
        sizes = {"sum": Size(*spans)}
        return [p for seed in range(sets) for p in problems(each, seed, kinds=("sum",), sizes=sizes)]


@dataclass(frozen=True)
class Desk:
    """Problems of a regime with their prompts read, and their solutions with the full cache."""

    lm: Model
    regime: Regime
    prompted: Prompted
    states: list[dict[str, Tensor]]
    """What each layer holds once the prompts are read, the newest queries included."""
    full: Tensor
    """`[B, steps]`."""

    @property
    def length(self) -> int:
        """Tokens of a problem and its solution."""
        return int(self.states[0]["columns"]) + self.prompted.steps

    def cache(self, method: EvictingKV) -> Cache:
        """A method's cache that has read the prompts."""
        cache = method.new_cache(self.lm.model.config)
        for layer, state in zip(cache.layers, self.states, strict=True):
            held = {name: x.clone() for name, x in state.items() if name != "queries"}
            if method.window:
                held["queries"] = _newest(state["queries"], int(state["columns"]), method.watched)
            layer.restore(held)
        return cache

    def solve(self, method: EvictingKV) -> Tensor:
        """Solutions `[B, steps]` through a method's cache, which holds the prompts already."""
        read = replace(self.prompted, cache=DynamicCache())
        return solve(self.lm.model, read, self.cache(method))


def _newest(ring: Tensor, columns: int, watched: int) -> Tensor:
    """The newest `watched` queries of a ring `[B, H_q, W, D]` that has seen so many columns, as a ring."""
    newest = torch.arange(columns - watched, columns)
    found = ring[:, :, newest % ring.shape[2]]
    return torch.empty_like(found).index_copy(2, newest % watched, found)


@torch.no_grad()
def lay_out(lm: Model, regime: Regime, sets: int, each: int, buffer: int) -> Desk:
    """Read the prompts of a regime and solve them with the full cache.

    Raises RuntimeError when eviction or selection with a budget above the length writes anything else.
    """
    prompted = read_prompts(lm, regime.examples(sets, each))
    full = solve(lm.model, prompted, DynamicCache(config=lm.model.config))
    rows = torch.tensor([lm.encode(example.prompt) for example in prompted.examples], device=lm.device)
    roomy = {"budget": -(-(rows.shape[1] + prompted.steps) // buffer) * buffer + buffer, "buffer": buffer}
    cache = SnapKV(**roomy).new_cache(lm.model.config)
    lm.model(rows, past_key_values=cache, logits_to_keep=1)
    desk = Desk(lm, regime, prompted, [layer.state() for layer in cache.layers], full)
    for name, method in {"eviction": SnapKV(**roomy), SELECTION: Selection(**roomy)}.items():
        if not torch.equal(desk.solve(method), full):
            raise RuntimeError(f"control failed: {name} with room for all changed what was written")
    return desk


def solving_study(desk: Desk, sets: int, buffer: int, step: Callable[[str], None]) -> list[Row]:
    """Exact match, and the share of the full cache's solution that is repeated before the first departure.

    A repetition is a set of problems, with a policy seed of its own.
    """
    rows = [_row(desk, desk.full, sets, FULL, None)]
    for budget in desk.regime.budgets:
        ceiling = {SELECTION: Selection(budget=budget, buffer=buffer)}
        for name, method in (ceiling | policies(budget, buffer, sets)).items():
            step(f"solving, {desk.regime.name}: {name}, {budget}")
            rows.append(_row(desk, desk.solve(method), sets, name, budget))
    return rows


def _row(desk: Desk, written: Tensor, sets: int, name: str, budget: int | None) -> Row:
    end = desk.lm.tokenizer.eos_token_id
    shares = []
    for right_one, row in zip(desk.full.tolist(), written.tolist(), strict=True):
        solution = right_one[: right_one.index(end) + 1] if end in right_one else right_one
        shares.append(common_prefix(solution, row) / len(solution))
    kept = torch.tensor(shares, dtype=torch.float64).view(sets, -1).mean(1).tolist()
    head = {"study": "solving", "model": "zoo:reasoner", "regime": desk.regime.name, "length": desk.length}
    marks = right(desk.lm, desk.prompted, written, sets)
    return {**head, "budget": budget, "method": name, "exact_match": marks, "repeated": kept}
