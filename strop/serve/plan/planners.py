"""Planners by name.

`splitwise` is the same search under a condition on roles (arXiv 2606.03770's baseline) and not the real
Splitwise, whose pools lend instances while they run: that is a policy of the simulator, for any plan. How
many replicas take each role is left to the search, and follows in the paper from the ratio of tokens in and
out; so the baseline here is never the weaker one.
"""

from collections.abc import Callable
from functools import partial

from strop.core.errors import StropError
from strop.core.files import did_you_mean
from strop.serve.plan.baselines import MemoryProportional, SinglePipeline
from strop.serve.plan.exhaustive import Exhaustive
from strop.serve.plan.genetic import Genetic
from strop.serve.plan.plan import PlacementPlanner
from strop.serve.plan.roles import Disaggregated, Mixed, Objective
from strop.serve.plan.search import Search

ALL_TRIED = 9
"""Devices up to which every partition is tried."""
PLANNERS = ("auto", "exhaustive", "genetic", "splitwise", "single", "memory", "mixed")
RIVALS = {
    "splitwise": "Splitwise, adapted",
    "mixed": "no disaggregation",
    "single": "one pipeline",
    "memory": "one, by memory",
}
"""What a plan is shown beside, as people read it."""


def planner(
    name: str, devices: int, min_tps: float = 7.0, seed: int = 0, min_replicas: int = 1
) -> PlacementPlanner:
    """A planner for so many devices; `auto` tries all partitions of up to 9 devices and evolves beyond."""
    objectives: dict[str, Objective] = {
        "splitwise": Disaggregated(min_replicas, ordered=True),
        "mixed": Mixed(),
    }
    found: dict[str, Callable[[], PlacementPlanner]] = {
        "single": partial(SinglePipeline, min_tps=min_tps),
        "memory": partial(MemoryProportional, min_tps=min_tps),
    }
    if name not in PLANNERS:
        raise StropError(f"unknown planner {name!r}; {did_you_mean(name, list(PLANNERS))}")
    if name in found:
        return found[name]()
    every = name == "exhaustive" or (name != "genetic" and devices <= ALL_TRIED)
    kind: Callable[..., Search] = Exhaustive if every else partial(Genetic.sized, devices, seed=seed)
    label = name if name in objectives else "exhaustive" if every else "genetic"
    objective = objectives.get(name, Disaggregated(min_replicas))
    return kind(name=label, min_tps=min_tps, objective=objective)
