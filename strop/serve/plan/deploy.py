"""A deployment plan as a fleet to simulate: a pipeline a replica, at one switch with a host a device.

Each replica follows the law of its slowest stage (arXiv 2606.03770): K stages of T seconds take in a prompt
every T, have it done after K * T, and give each request a token every K * T. The slowest is that of the
plan's mean request. KV moves from master to master, all of it, at the speed of the link between these two.
"""

import math
from pathlib import Path
from typing import NamedTuple

from strop.core.errors import StropError
from strop.serve.cluster import Cluster, Group
from strop.serve.latency import Pipeline
from strop.serve.plan.plan import MIXED, DeploymentPlan, Replica
from strop.serve.plan.workload import Workload
from strop.serve.topology import Flat


class Piece(NamedTuple):
    """A stage, or the transfer to one."""

    base: float
    """Seconds of a prompt, whatever its length."""
    token: float
    """Seconds of a prompt's token."""
    decode: tuple[float, ...]
    """Seconds of a step of 1, 2, ... requests."""

    def prompt(self, size: Workload) -> float:
        """Seconds of a mean prompt."""
        return self.base + self.token * size.prompt


def load(path: Path) -> Cluster:
    """The fleet that a plan's file says. Raises StropError for anything wrong in it."""
    plan = DeploymentPlan.from_yaml(path)
    try:
        return fleet(plan)
    except ValueError as error:
        raise StropError(f"{path} cannot be simulated: {error}; plan again") from error


def fleet(plan: DeploymentPlan) -> Cluster:
    """An instance a replica, on the host of its master; hosts are numbered as `plan.devices`, then `idle`."""
    number = {name: host for host, name in enumerate((*plan.devices, *plan.idle))}
    link = plan.links.default
    groups = []
    for replica in plan.replicas:
        (master,) = (stage.device for stage in replica.stages if stage.master)
        groups.append(
            Group(
                role="both" if replica.role == MIXED else replica.role,
                hosts=(number[master],),
                latency=pipeline(replica, plan.workload),
                kv_tokens=replica.kv_tokens,
                batch=places(replica, plan.min_tps),
            )
        )
    pairs = tuple(
        (*sorted(number[name] for name in ends), own.bandwidth, own.rtt)
        for ends, own in plan.links.pairs.items()
    )
    network = Flat(hosts=len(number), bandwidth=link.bandwidth, rtt=link.rtt, pairs=pairs)
    return Cluster(network=network, instances=tuple(groups), kv_bytes=plan.kv_bytes)


def places(replica: Replica, min_tps: float) -> int:
    """Requests that it decodes at once: of a prefill replica, if lent, as many as get `min_tps`, or 1."""
    fast = [n for n in range(1, len(replica.pace) + 1) if replica.step_seconds(n) * min_tps <= 1]
    return replica.concurrency or max(fast, default=1)


def pipeline(replica: Replica, size: Workload) -> Pipeline:
    """The pace of a replica's slowest stage or transfer: for prompts and for steps, or if mixed for both."""
    pieces = []
    for stage in replica.stages:
        steps = tuple(stage.receive(micro) for micro in range(1, len(stage.decode) + 1))
        pieces.append(Piece(stage.prefill_base, stage.prefill_token, stage.decode))
        pieces.append(Piece(stage.receive_base, stage.receive_token, steps))
    stages, pace = len(replica.stages), replica.pace
    slowest = max(pieces, key=lambda piece: piece.prompt(size))
    if replica.role == MIXED:
        micro = min(math.ceil(replica.concurrency / stages), len(pace))
        turns = size.output * stages / replica.concurrency
        slowest = max(pieces, key=lambda piece: piece.prompt(size) + turns * piece.decode[micro - 1])
        pace = slowest.decode
    return Pipeline(stages=stages, prefill_base=slowest.base, prefill_token=slowest.token, decode_stage=pace)
