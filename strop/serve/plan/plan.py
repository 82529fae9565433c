"""A deployment plan: which devices form which replica, with what role, layers and speed; and its YAML.

The file holds all that a simulator needs: for each stage the seconds of a prompt (base and a token) and of a
step by micro-batch, both with the head where the stage has it, and the seconds in which it receives its
input. A pipeline of K stages takes K micro-batches at a time (arXiv 2606.03770).
"""

import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from strop.core.errors import StropError, quoted
from strop.core.files import atomic
from strop.core.method import Method
from strop.core.nodes import read_yaml, scalar
from strop.serve.plan.devices import Device, Links, mapping, parse_links
from strop.serve.plan.model import ModelShape
from strop.serve.plan.workload import Workload
from strop.serve.topology import MOST

VERSION = 1
PREFILL, DECODE, MIXED = "prefill", "decode", "mixed"
ROLES = (PREFILL, DECODE, MIXED)
Report = Callable[[str, float], None]
"""Called with what is going on and the share of it that is done."""


@dataclass(frozen=True)
class Stage:
    """A run of blocks on a device."""

    device: str
    first: int
    """Number of its first block."""
    last: int
    """Number of its last block."""
    master: bool
    """Whether it has head and output layer."""
    offloaded: int
    """Blocks whose feed-forward part lies in RAM."""
    prefill_base: float
    """Seconds of a prompt, whatever its length."""
    prefill_token: float
    """Seconds of a prompt's token."""
    decode: tuple[float, ...]
    """Seconds of a step of 1, 2, ... requests."""
    receive_base: float = 0.0
    """Seconds until input arrives from the stage before."""
    receive_token: float = 0.0
    """Seconds more for each token of it."""

    @property
    def blocks(self) -> int:
        """How many it has."""
        return self.last - self.first + 1

    def prefill(self, tokens: float) -> float:
        """Seconds of a prompt."""
        return self.prefill_base + self.prefill_token * tokens

    def receive(self, tokens: float) -> float:
        """Seconds in which the input of so many tokens arrives."""
        return self.receive_base + self.receive_token * tokens


@dataclass(frozen=True)
class Replica:
    """A pipeline that holds the whole model."""

    role: str
    concurrency: int
    """Requests that it decodes at once; 0 of a prefill replica."""
    speed: float
    """Predicted: prompt tokens a second, generated tokens a second, or requests a second of a mixed one."""
    kv_tokens: int
    """Tokens of mean requests whose KV fits."""
    stages: tuple[Stage, ...]

    def prefill_seconds(self, tokens: float) -> float:
        """Between two prompts in a row: the slowest stage, or the slowest transfer."""
        return max(max(stage.prefill(tokens), stage.receive(tokens)) for stage in self.stages)

    def prompt_latency(self, tokens: float) -> float:
        """From a prompt's entry to its first token: all stages, and all transfers."""
        return sum(stage.prefill(tokens) + stage.receive(tokens) for stage in self.stages)

    @property
    def pace(self) -> tuple[float, ...]:
        """Seconds of the slowest stage, or transfer, for a step of micro-batches of 1, 2, ... requests."""
        most = min(len(stage.decode) for stage in self.stages)
        return tuple(
            max(max(stage.decode[micro - 1], stage.receive(micro)) for stage in self.stages)
            for micro in range(1, most + 1)
        )

    def step_seconds(self, requests: int) -> float:
        """Between two tokens of a request, with so many at once, in as many micro-batches as stages."""
        return len(self.stages) * self.pace[-(-requests // len(self.stages)) - 1]


@dataclass(frozen=True)
class DeploymentPlan:
    """Replicas, and what they were planned for."""

    planner: str
    model: str
    blocks: int
    kv_bytes: float
    """KV bytes a token of a mean prompt, over all blocks."""
    workload: Workload
    min_tps: float
    """Tokens a second that each request gets at least."""
    phase: float
    """Predicted seconds a request of the busier role, or of mixed replicas together."""
    links: Links
    replicas: tuple[Replica, ...]
    idle: tuple[str, ...] = ()
    """Devices that serve nothing, which is a defect of the plan."""

    @property
    def stable(self) -> bool | None:
        """Whether queues stay bounded at the workload's period; None where it has none."""
        period = self.workload.period
        return None if period is None else self.phase <= period

    @property
    def bottleneck(self) -> float | None:
        """Seconds by which each further request waits longer, where positive."""
        return None if self.workload.period is None else self.phase - self.workload.period

    @property
    def devices(self) -> list[str]:
        """All that serve."""
        return [stage.device for replica in self.replicas for stage in replica.stages]

    def to_dict(self) -> dict[str, Any]:
        """As the file says it."""
        head: dict[str, Any] = {"strop_plan": VERSION}
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["workload"], plain["links"] = self.workload.to_dict(), self.links.to_dict()
        plain["idle"] = list(self.idle)
        plain["replicas"] = [_listed(asdict(replica)) for replica in self.replicas]
        return head | plain

    def to_yaml(self) -> str:
        """The plan as text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=100)

    def save(self, path: Path) -> None:
        """Write the plan, whole or not at all."""
        with atomic(path) as temporary:
            temporary.write_text(self.to_yaml(), encoding="utf-8")

    @classmethod
    def from_yaml(cls, path: Path) -> "DeploymentPlan":
        """Read a plan. Raises StropError for anything wrong in it."""
        data = mapping(read_yaml(path, "plan"), str(path), ("strop_plan", *(f.name for f in fields(cls))))
        if data["strop_plan"] != VERSION:
            raise StropError(f"{path} starts with `strop_plan: {VERSION}`, got {quoted(data['strop_plan'])}")
        replicas = tuple(_replica(node, f"replica {k}") for k, node in enumerate(_list(data["replicas"])))
        idle = tuple(map(str, _list(data["idle"])))
        names = [stage.device for replica in replicas for stage in replica.stages]
        plan: DeploymentPlan = _object(
            cls,
            {key: value for key, value in data.items() if key != "strop_plan"},
            str(path),
            workload=Workload.from_dict(data["workload"], "workload"),
            links=parse_links(data["links"], [*names, *idle]),
            replicas=replicas,
            idle=idle,
        )
        _check(plan, str(path))
        return plan


class PlacementPlanner(Method, ABC):
    """From devices and a workload to a plan. Subclasses are frozen dataclasses of the settings."""

    @abstractmethod
    def plan(
        self,
        devices: Sequence[Device],
        links: Links,
        model: ModelShape,
        workload: Workload,
        report: Report = lambda what, share: None,
    ) -> DeploymentPlan:
        """The best plan found. Raises StropError where none exists, naming what is short."""


def _listed(value: Any) -> Any:
    """With lists for tuples, which YAML has no word for."""
    if isinstance(value, dict):
        return {key: _listed(one) for key, one in value.items()}
    return [_listed(one) for one in value] if isinstance(value, (tuple, list)) else value


def _list(node: Any) -> list[Any]:
    if not isinstance(node, list):
        raise StropError(f"a plan has lists of replicas, stages and idle devices, got {quoted(node)}")
    return node


def _replica(node: Any, where: str) -> Replica:
    stages = _list(mapping(node, where, [field.name for field in fields(Replica)])["stages"])
    found = tuple(_object(Stage, stage, f"{where}, stage {k}") for k, stage in enumerate(stages))
    return _object(Replica, node, where, stages=found)


def _object(kind: type, node: Any, where: str, **made: Any) -> Any:
    """An object whose fields are those of a mapping, but for those that are `made`."""
    hints = typing.get_type_hints(kind)
    node = mapping(node, where, list(hints))
    plain = {key: scalar(f"{where}.{key}", node[key], hints[key]) for key in hints if key not in made}
    for key, value in plain.items():
        numbers = value if isinstance(value, tuple) else [value]
        if not all(0 <= one <= MOST for one in numbers if isinstance(one, (int, float))):
            raise StropError(f"{where}.{key} holds finite numbers from 0 to {MOST:g}, got {quoted(value)}")
    return kind(**plain, **made)


def _check(plan: DeploymentPlan, where: str) -> None:
    """Raise StropError unless each replica holds every block once, and has one master and known role."""
    if not plan.replicas:
        raise StropError(f"{where} has no replica: plan again")
    if len(set(plan.devices)) < len(plan.devices):
        raise StropError(f"{where} gives a device two stages: plan again")
    if len({*plan.devices, *plan.idle}) < len(plan.devices) + len(plan.idle):
        raise StropError(f"{where} has an idle device that serves, or twice: plan again")
    for k, replica in enumerate(plan.replicas):
        ends = [-1, *(stage.last for stage in replica.stages)]
        firsts = [stage.first for stage in replica.stages]
        whole = firsts == [end + 1 for end in ends[:-1]] and ends[-1] == plan.blocks - 1
        if not whole or sum(stage.master for stage in replica.stages) != 1:
            raise StropError(
                f"replica {k} of {where} needs every block once, in order, and one master: plan again"
            )
        if not all(stage.decode for stage in replica.stages):
            raise StropError(f"replica {k} of {where} has a stage without seconds of decode: plan again")
        if replica.role not in ROLES or (replica.concurrency < 1) != (replica.role == PREFILL):
            raise StropError(f"replica {k} of {where} is {', '.join(ROLES)} with a concurrency: plan again")
