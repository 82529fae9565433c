"""What a plan is compared with: all devices in one pipeline, split by the dynamic programme or by memory.

It prefills and decodes, and is predicted as `replica` says; whether each request gets its least speed is
judged with all places taken and prompts read in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from strop.core.errors import StropError
from strop.serve.plan.devices import Device, Links
from strop.serve.plan.model import ModelShape
from strop.serve.plan.plan import MIXED, DeploymentPlan, PlacementPlanner, Report
from strop.serve.plan.replica import Groups, Layout
from strop.serve.plan.search import deployed
from strop.serve.plan.workload import Workload


@dataclass(frozen=True, kw_only=True)
class SinglePipeline(PlacementPlanner):
    """All devices in one pipeline that does both, split by the dynamic programme."""

    min_tps: float = 7.0

    def plan(
        self,
        devices: Sequence[Device],
        links: Links,
        model: ModelShape,
        workload: Workload,
        report: Report = lambda what, share: None,
    ) -> DeploymentPlan:
        """The pipeline, whose order follows the links."""
        groups = Groups(devices, links, model, workload, self.min_tps)
        speed = groups.rates(groups.everyone, both=True).prefill
        if not speed:
            slowest = groups.solve(groups.everyone, MIXED)[0].slowest
            raise StropError(f"one pipeline of all devices does not serve: {_lack(groups, slowest)}")
        return deployed("single", groups, [groups.replica(groups.everyone, MIXED)], 1 / speed)


@dataclass(frozen=True, kw_only=True)
class MemoryProportional(PlacementPlanner):
    """All devices in one pipeline, each with blocks in proportion to its memory, as exo splits by default."""

    min_tps: float = 7.0

    def plan(
        self,
        devices: Sequence[Device],
        links: Links,
        model: ModelShape,
        workload: Workload,
        report: Report = lambda what, share: None,
    ) -> DeploymentPlan:
        """The pipeline, with the best master; devices whose share is no block stay idle."""
        groups = Groups(devices, links, model, workload, self.min_tps)
        memory = np.array([device.memory for device in devices])
        ends = np.rint(np.cumsum(memory) / memory.sum() * model.blocks).astype(int)
        counts = np.diff([0, *ends])
        order = [k for k, count in enumerate(counts) if count]
        first = [int(ends[k] - counts[k]) for k in order]
        mask = sum(1 << k for k in order)
        layouts = [Layout(order, first, master) for master in range(len(order))]
        slowest = np.array([groups.fixed(layout) for layout in layouts])
        speeds = [groups.best(mask, MIXED, row) for row in slowest]
        best = max(range(len(order)), key=lambda master: speeds[master][0])
        speed, choice = speeds[best]
        if not speed:
            raise StropError(f"a split by memory does not serve: {_lack(groups, slowest.min(0), len(order))}")
        return deployed("memory", groups, [groups.built(layouts[best], MIXED, speed, choice)], 1 / speed)


def _lack(groups: Groups, slowest: np.ndarray, stages: int | None = None) -> str:
    if groups.model.blocks < len(groups.devices):
        return (
            f"{groups.model.name} has {groups.model.blocks} blocks, fewer than devices; name fewer of these"
        )
    if not np.isfinite(slowest).any():
        return "some device has too little memory for its blocks; use another --planner"
    mask = groups.everyone if stages is None else (1 << stages) - 1
    tps = groups.tps(mask, MIXED, slowest).max()
    return f"a request gets {tps:.3g} tokens a second at most, below {groups.min_tps:g}; lower --min-tps"
