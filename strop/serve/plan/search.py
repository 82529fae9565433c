"""What all searches share: judging partitions, making the plan, and saying why there is none."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from strop.core.errors import StropError
from strop.core.words import size
from strop.serve.plan.devices import Device, Links
from strop.serve.plan.model import ModelShape
from strop.serve.plan.plan import DECODE, PREFILL, ROLES, DeploymentPlan, PlacementPlanner, Replica, Report
from strop.serve.plan.replica import Groups
from strop.serve.plan.roles import Disaggregated, Objective
from strop.serve.plan.workload import Workload


class Found(NamedTuple):
    """The best partition of the devices."""

    phase: float
    masks: tuple[int, ...]
    prefill: np.ndarray
    """Which groups prefill."""


@dataclass(frozen=True, kw_only=True)
class Search(PlacementPlanner):
    """Partitions of the devices into groups, judged by an objective."""

    name: str = "search"
    min_tps: float = 7.0
    """Tokens a second that each request gets at least."""
    objective: Objective = field(default_factory=Disaggregated)

    @abstractmethod
    def search(self, groups: Groups, report: Report) -> Found:
        """The best partition; its phase is infinite where none serves."""

    def plan(
        self,
        devices: Sequence[Device],
        links: Links,
        model: ModelShape,
        workload: Workload,
        report: Report = lambda what, share: None,
    ) -> DeploymentPlan:
        """The best plan found."""
        groups = Groups(devices, links, model, workload, self.min_tps)
        found = self.search(groups, report)
        if not found.phase < np.inf:
            raise StropError(why_not(groups, self.objective))
        roles = self.objective.roles(found.prefill)
        serving = [
            groups.replica(mask, role)
            for mask, role in zip(found.masks, roles, strict=True)
            if serves(self.objective.rates(groups, mask), role)
        ]
        return deployed(self.name, groups, serving, found.phase)


def serves(rates: tuple[float, float, int], role: str) -> bool:
    """Whether a group achieves anything in a role."""
    return (rates[1] if role == DECODE else rates[0]) > 0


def deployed(name: str, groups: Groups, replicas: Sequence[Replica], phase: float) -> DeploymentPlan:
    """A plan of replicas, those that prefill first, then the faster ones."""
    ordered = sorted(replicas, key=lambda replica: (ROLES.index(replica.role), -replica.speed))
    busy = {stage.device for replica in ordered for stage in replica.stages}
    load = groups.workload
    return DeploymentPlan(
        planner=name,
        model=groups.model.name,
        blocks=groups.model.blocks,
        kv_bytes=sum(groups.model.kept(load.prompt)) / load.prompt,
        workload=load,
        min_tps=groups.min_tps,
        phase=phase,
        links=groups.links,
        replicas=tuple(ordered),
        idle=tuple(device.name for device in groups.devices if device.name not in busy),
    )


def why_not(groups: Groups, objective: Objective) -> str:
    """One sentence on why no partition serves, and the way out."""
    model, devices = groups.model, groups.devices
    apart = isinstance(objective, Disaggregated)
    least = 2 * objective.min_replicas if isinstance(objective, Disaggregated) else 1
    if len(devices) < least:
        return (
            f"prefill and decode on devices of their own need {least} devices at least "
            f"and there is {len(devices)}: add some, or use --planner single"
        )
    held = [mask for mask in all_masks(groups) if np.isfinite(groups.solve(mask, PREFILL)[0].slowest[0])]
    if not held:
        return _short(groups)
    decoding = {mask: groups.tps(mask, DECODE, groups.solve(mask, DECODE)[0].slowest)[0] for mask in held}
    fastest = max(decoding, key=decoding.__getitem__)
    if decoding[fastest] < groups.min_tps:
        names = ", ".join(devices[k].name for k in groups.members(fastest))
        return (
            f"no group of devices gives a request {groups.min_tps:g} tokens a second: the best is "
            f"{decoding[fastest]:.3g}, with one request on {names}; lower --min-tps"
        )
    need = 2 * model.weight_bytes
    have = sum(_holds(device, model) for device in devices)
    if apart and have < need:
        return (
            f"prefill and decode need the weights of {model.name} each, {size(need)} in all, and the devices "
            f"have {size(have)}, {size(need - have)} too little: add memory, or use --planner single or mixed"
        )
    return (
        "no way to part these devices serves: add memory, lower --min-tps or --min-replicas, or use "
        "--planner single or mixed"
    )


def all_masks(groups: Groups) -> list[int]:
    """Every group, small ones first; where there are too many, single devices and all together."""
    if len(groups.devices) <= 12:
        return sorted(range(1, groups.everyone + 1), key=lambda mask: (mask.bit_count(), mask))
    return [*(1 << k for k in range(len(groups.devices))), groups.everyone]


def _holds(device: Device, model: ModelShape) -> float:
    """Bytes of a model that lie on a device at most; RAM takes nothing but feed-forward parts."""
    away = model.blocks * model.ffn_bytes
    return device.memory + (min(device.offload.memory, away) if device.offload else 0.0)


def _short(groups: Groups) -> str:
    """Which memory is short by how much."""
    model, devices, workload = groups.model, groups.devices, groups.workload
    kv = sum(model.kept(workload.prompt))
    need, have = model.weight_bytes + kv, sum(_holds(device, model) for device in devices)
    told = f"{model.name} needs {size(need)}, {size(kv)} of it for the KV of one prompt"
    if have < need:
        return (
            f"{told}, and all devices together hold {size(have)}: memory is short by {size(need - have)}; "
            "add a device, or take a smaller model"
        )
    block = model.block_bytes + kv / model.blocks
    plain = [_blocks(device, model, block) for device in devices]
    master = [_blocks(device, model, block, model.head_bytes) for device in devices]
    if not any(master):
        largest = max(devices, key=lambda device: device.memory)
        kept = block - model.ffn_bytes if largest.offload else block
        return (
            f"{told}, and {size(model.head_bytes)} with a block of {size(block)} on one device, and "
            f"{largest.name}, the largest, holds {size(largest.memory)}: it is short by "
            f"{size(kept + model.head_bytes - largest.memory)}"
        )
    most = max(sum(plain) - one + other for one, other in zip(plain, master, strict=True) if other)
    return (
        f"{told} and {size(block)} for each of {model.blocks} blocks, of which the devices hold {most} in "
        f"whole beside the head: memory is short by {size(max(model.blocks - most, 1) * block)}; add memory"
    )


def _blocks(device: Device, model: ModelShape, block: float, head: float = 0.0) -> int:
    """Whole blocks that a device holds beside a head, the feed-forward parts of some in RAM."""
    free, ffn = device.memory - head, model.ffn_bytes
    away = min(device.offload.memory // ffn, model.blocks) if device.offload and ffn else 0
    if away * (block - ffn) > free:
        return max(int(free // (block - ffn)), 0)
    return int(min((free + away * ffn) // block, model.blocks))
