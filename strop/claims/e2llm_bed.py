"""What E2LLM's claims are planned for and simulated on: seven devices, random ones, and lengths of requests.

The seven are those of examples/edge-7.yaml, whose times were fitted to what the paper publishes of its plans.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from strop.claims.base import Progress
from strop.claims.fleet_bed import checked
from strop.core.errors import StropError
from strop.serve.base import Job, Request, Trace
from strop.serve.plan import (
    DeploymentPlan,
    Device,
    Links,
    ModelShape,
    Timing,
    Workload,
    planner,
    read_devices,
    read_model,
)
from strop.serve.plan.deploy import fleet
from strop.serve.plan.plan import DECODE, PREFILL
from strop.serve.plan.replica import Groups, Layout
from strop.serve.plan.search import deployed
from strop.serve.results import Results
from strop.serve.routing.jsq import JSQ
from strop.serve.routing.splitwise import Splitwise
from strop.serve.simulate import Simulation
from strop.serve.topology import Flat
from strop.serve.traces.base import stream, waits

EDGE = Path(__file__).parents[2] / "examples" / "edge-7.yaml"
MODEL = "name=gpt-oss-20b,blocks=24,hidden=2880,kv_heads=8,head_dim=64,block=476MB,ffn=423MB,head=2.3GB"
LAN, FREE = "the plan's network", "a free network"
LENGTHS = {"extended": (576, 588), "custom": (2284, 1004)}
"""Mean tokens in and out of the paper's two sets of requests."""
PERIODS = (0.5, 1.0, 2.0, 3.0)
"""Seconds between arrivals."""
MIN_TPS = 15.0
"""Tokens a second that the paper's experiments plan with."""
FLOOR = 7.0
"""And those that it asks for, of random devices."""
CV = 0.5
"""Coefficient of variation of lengths, Gamma-distributed: the paper gives means only."""
MANY = 256
"""Places of a replica where memory alone bounds it."""
BLOCK = 16
"""Tokens that memory is given out by where lengths are a trace's."""

E2LLM, SPLITWISE, LENDING, UNBOUND, MIXED, SINGLE, MEMORY = (
    "E2LLM",
    "adapted Splitwise",
    "Splitwise with its mixed pool",
    "the same by memory alone",
    "no disaggregation",
    "one pipeline",
    "one, by memory",
)
PLANNERS = {
    E2LLM: "exhaustive",
    SPLITWISE: "splitwise",
    LENDING: "splitwise",
    UNBOUND: "splitwise",
    MIXED: "mixed",
    SINGLE: "single",
    MEMORY: "memory",
}
"""The planner of each. With a mixed pool, replicas are those of adapted Splitwise, lent as they run: with the
places that the plan gives them, or by memory alone, as the original bounds them."""
E2LLM_TOLD, SPLITWISE_TOLD = "E2LLM as published", "Splitwise as published"
TOLD: dict[str, dict[str, tuple[tuple[int, dict[str, int]], ...]]] = {
    E2LLM_TOLD: {
        "extended": (
            (0, {"agx-orin": 24}),
            (2, {"m1-b": 10, "m1-a": 14}),
            (5, {"m2-max-b": 24}),
            (5, {"m2-max-a": 24}),
            (10, {"rtx-5070": 17, "rtx-3060m": 7}),
        ),
        "custom": (
            (0, {"m2-max-b": 24}),
            (2, {"m1-b": 10, "m1-a": 14}),
            (1, {"agx-orin": 24}),
            (5, {"m2-max-a": 24}),
            (10, {"rtx-5070": 17, "rtx-3060m": 7}),
        ),
    },
    SPLITWISE_TOLD: {
        "extended": (
            (0, {"agx-orin": 24}),
            (6, {"m2-max-a": 17, "m1-b": 7}),
            (2, {"rtx-3060m": 24}),
            (9, {"rtx-5070": 16, "m2-max-b": 6, "m1-a": 2}),
        ),
        "custom": (
            (0, {"m2-max-b": 24}),
            (6, {"m2-max-a": 17, "m1-b": 7}),
            (1, {"agx-orin": 24}),
            (9, {"rtx-5070": 16, "rtx-3060m": 6, "m1-a": 2}),
        ),
    },
}
"""The paper's own plans: requests at once, 0 for prefill, and blocks; the first device has the head."""
LAYING = 1
"""Measurements that `lay` announces."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiments are."""

    name: str
    instances: int = 50
    """Sets of random devices."""
    devices: int = 7
    seeds: int = 10
    """Draws of lengths."""
    requests: int = 150
    """A run: the paper's waiting times grow as if it had 100 to 200."""
    sampled: int = 1000
    """Requests drawn from a trace."""


SCALES = {"cpu": Scale(name="cpu"), "gpu": Scale(name="gpu", instances=200, seeds=30)}
"""Nothing here runs on a GPU: the larger scale has more repetitions."""


@dataclass(frozen=True)
class Bed:
    """Devices, their links, and the model."""

    devices: list[Device]
    links: Links
    model: ModelShape

    def plan(self, name: str, size: Workload) -> DeploymentPlan:
        """The plan of one of `PLANNERS`. Raises StropError where there is none."""
        made = planner(PLANNERS[name], len(self.devices), MIN_TPS)
        return made.plan(self.devices, self.links, self.model, size)

    def told(self, name: str, data: str) -> DeploymentPlan:
        """One of the paper's plans, at the speeds that the profile of the seven devices predicts for it."""
        groups = Groups(self.devices, self.links, self.model, Workload(*LENGTHS[data]), MIN_TPS)
        numbers = {device.name: number for number, device in enumerate(self.devices)}
        replicas = []
        for requests, blocks in TOLD[name][data]:
            first = np.cumsum([0, *blocks.values()])[:-1].tolist()
            layout = Layout([numbers[device] for device in blocks], first, 0)
            role = DECODE if requests else PREFILL
            replica = groups.built(layout, role, 0.0, max(requests - 1, 0))
            prompt = groups.workload.prompt
            speed = (
                requests / replica.step_seconds(requests)
                if requests
                else prompt / replica.prefill_seconds(prompt)
            )
            replicas.append(replace(replica, speed=speed))
        plan = deployed(name, groups, replicas, 0.0)
        return replace(plan, phase=predicted(plan, groups.workload))


def lay(scale: Scale, progress: Progress) -> Bed:
    """Read the devices."""
    progress("reading the seven devices")
    if not EDGE.is_file():
        raise StropError(f"E2LLM's claims plan for {EDGE}, which is not there: run them in a checkout")
    devices, links = read_devices(EDGE)
    return Bed(devices, links, read_model(MODEL))


TimingT = TypeVar("TimingT", bound=Timing)


def random_devices(rng: np.random.Generator, like: Sequence[Device], count: int) -> list[Device]:
    """Each is one of `like`, its times and its memory multiplied by numbers of its own."""
    found = []
    for number in range(count):
        one = like[rng.integers(len(like))]
        read, step = rng.lognormal(0, 0.5, 2).tolist()
        device = Device(
            name=f"d{number}",
            memory=one.memory * rng.uniform(0.6, 1.4),
            block=_scaled(one.block, read, step),
            head=tuple(step * seconds for seconds in one.head),
            offload=None if one.offload is None else _scaled(one.offload, read, step),
        )
        found.append(device)
    return found


def _scaled(timing: TimingT, read: float, step: float) -> TimingT:
    return replace(
        timing,
        prefill_base=read * timing.prefill_base,
        prefill_token=read * timing.prefill_token,
        decode=tuple(step * seconds for seconds in timing.decode),
    )


class Lengths(NamedTuple):
    """Tokens in and out of requests, `[N]` each."""

    prompt: np.ndarray
    output: np.ndarray

    @property
    def workload(self) -> Workload:
        """Their means."""
        return Workload(float(self.prompt.mean()), float(self.output.mean()))

    def trace(self, name: str, period: float, block: int = 1) -> Trace:
        """Requests of these lengths, one every `period` seconds, that share nothing."""
        pairs = enumerate(zip(self.prompt.tolist(), self.output.tolist(), strict=True))
        jobs = [Job(Request(number, *pair[:1]), pair[1], number * period) for number, pair in pairs]
        return Trace(name, jobs, block)


def drawn(data: str, requests: int, seed: int) -> Lengths:
    """Lengths with the means of one of `LENGTHS`."""
    prompt, output = (
        np.maximum(1, np.rint(waits(stream(seed, f"{data} {what}"), mean, CV, requests))).astype(np.int64)
        for what, mean in zip(("in", "out"), LENGTHS[data], strict=True)
    )
    return Lengths(prompt, output)


def serve(plan: DeploymentPlan, trace: Trace, network: str = LAN, name: str = E2LLM) -> Results:
    """One run of a plan as one of `PLANNERS` routes, checked: where none is lent, by the shortest queue."""
    cluster = fleet(plan)
    if network == FREE:
        cluster = replace(cluster, network=Flat(hosts=cluster.network.hosts, bandwidth=1e15, rtt=0.0))
    if name == UNBOUND:
        wide = tuple(replace(group, batch=MANY) for group in cluster.instances)
        cluster = replace(cluster, instances=wide)
    return checked(Simulation(cluster, trace, Splitwise() if name in (LENDING, UNBOUND) else JSQ()))


def waiting(results: Results) -> np.ndarray:
    """Seconds that requests wait, `[N]`: for their prompt to begin, and for their KV to move."""
    stages = results.stages()
    return stages["queue"] + stages["transfer"]


def predicted(plan: DeploymentPlan, size: Workload) -> float:
    """Seconds a request that a plan predicts for other means than it was made for."""
    prompts = sum(1 / one.prefill_seconds(size.prompt) for one in plan.replicas if not one.concurrency)
    tokens = sum(one.speed for one in plan.replicas if one.concurrency)
    return max(1 / prompts, size.output / tokens)
