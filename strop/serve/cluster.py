"""A fleet as its file says it: the network, and which instances stand on which hosts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strop.core.chunks import CHUNKS, BatchPolicy, Fixed
from strop.core.errors import StropError, quoted
from strop.core.evict import ONLINE
from strop.core.evict.worth import Reuse
from strop.core.files import did_you_mean
from strop.core.method import Method
from strop.core.nodes import construct, read_yaml
from strop.serve.background import Background, Constant, RandomWalk, Windows, require_seconds
from strop.serve.latency import Latency, Pipeline, Roofline
from strop.serve.topology import FatTree, Flat, Topology, require_amount

VERSION = 1
ROLES = ("prefill", "decode", "both")
ORDERS = ("fcfs", "program")
MOST = {"each": 10**6, "kv_tokens": 10**12, "batch": 10**6}
"""Of what a group counts."""
NAMES: dict[type, dict[str, type]] = {
    Topology: {"fat_tree": FatTree, "flat": Flat},
    Latency: {"roofline": Roofline, "pipeline": Pipeline},
    Background: {"constant": Constant, "random_walk": RandomWalk, "windows": Windows},
    BatchPolicy: CHUNKS,
}
"""What may stand where a kind of part is asked for."""


@dataclass(frozen=True, kw_only=True)
class Group(Method):
    """Instances that are alike."""

    role: str
    """prefill, decode, or both."""
    hosts: tuple[int, ...]
    """Numbers of the hosts that have them."""
    each: int = 1
    """Instances a host."""
    latency: Latency = field(default_factory=Roofline)
    kv_tokens: int = 425_984
    """Tokens of KV that one holds: 140 GB at 320 KiB each."""
    batch: int = 256
    """Most requests that decode at once."""
    evict: str = "lru"
    """Which cached blocks go when memory is needed."""
    reuse: Reuse = field(default_factory=lambda: Reuse(L=300.0))
    """How soon blocks are used again, for evictors that ask."""
    tune: bool = False
    """Whether `reuse` follows how long sessions are away, where prompts and answers share an instance."""
    holes: bool = False
    """Whether a cached block behind a missing one serves."""
    chunk: BatchPolicy = field(default_factory=Fixed)
    """Prompt tokens an iteration, where prompts and answers share an instance."""
    order: str = "fcfs"
    """Who goes first where they do: who came first, or of whose program (session) the first request did."""
    pin: bool = False
    """Whether KV is kept while a tool runs, as long as is likely to pay, where they do."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {self.role!r}")
        if self.evict not in ONLINE:
            raise ValueError(f"unknown evictor {self.evict!r}; {did_you_mean(self.evict, list(ONLINE))}")
        for name, most in MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name} must be at least 1 and at most {most:g}, got {quoted(getattr(self, name))}"
                )
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        together = self.pin or self.tune or self.order != "fcfs" or self.chunk != Fixed()
        if self.role != "both" and together:
            raise ValueError(
                f"pin, tune, order and chunk are for instances of both roles, not for {self.role}"
            )
        if self.role == "decode" and self.holes:
            raise ValueError("holes are for instances that compute prompts, not for decode")
        if not self.hosts:
            raise ValueError("hosts must name at least one host")


@dataclass(frozen=True, kw_only=True)
class Cluster(Method):
    """A fleet."""

    network: Topology = field(default_factory=FatTree)
    instances: tuple[Group, ...]
    kv_bytes: float = 327_680
    """Bytes of KV a token: those of a 70B-class model with 8 KV heads."""
    background: Background | None = None
    """Others' traffic."""
    telemetry: float = 1.0
    """Seconds between two measurements of that traffic."""
    reports: float = 0.0
    """Seconds between two reports of an instance's load; 0 for always fresh ones."""

    def __post_init__(self) -> None:
        require_amount("kv_bytes", self.kv_bytes)
        require_seconds("telemetry", self.telemetry)
        if self.reports != 0:
            require_seconds("reports", self.reports)
        roles = {group.role for group in self.instances}
        if roles != {"both"} and roles != {"prefill", "decode"}:
            raise ValueError("instances must be of both roles, or some prefill and the others decode")
        for host in (host for group in self.instances for host in group.hosts):
            if not 0 <= host < self.network.hosts:
                raise ValueError(f"host {host} is not in a network of {self.network.hosts}, numbered from 0")

    @property
    def shared(self) -> bool:
        """Whether prompts and answers share instances."""
        return self.instances[0].role == "both"

    def of(self, role: str) -> list[tuple[int, Group]]:
        """Host and group of each instance of a role."""
        groups = [group for group in self.instances if group.role == role]
        return [(host, group) for group in groups for host in group.hosts for _ in range(group.each)]

    @classmethod
    def load(cls, path: Path) -> "Cluster":
        """Read a file of a cluster or of a plan. Raises StropError with one sentence for anything wrong."""
        data = read_yaml(path, "cluster")
        if is_plan(data):
            from strop.serve.plan import deploy

            return deploy.load(path)
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> "Cluster":
        """Parse what a file says."""
        if not isinstance(data, dict) or data.get("strop") != VERSION:
            raise StropError(
                f"a cluster is a mapping that starts with `strop: {VERSION}`, or what `strop plan` wrote"
            )
        rest = {key: value for key, value in data.items() if key != "strop"}
        groups = rest.pop("instances", None)
        if not isinstance(groups, list) or not groups:
            raise StropError("a cluster lists its `instances`, at least one group")
        found = tuple(construct(Group, one, f"instances[{i}]", _part) for i, one in enumerate(groups))
        return construct(cls, rest, "cluster", _part, given={"instances": found})


def is_plan(data: Any) -> bool:
    """Whether a file's data are a deployment plan, as `strop plan` writes it."""
    return isinstance(data, dict) and "strop_plan" in data


def _part(where: str, node: Any, wanted: tuple[type, ...]) -> Any:
    """A part by its name, `name` or `name: {field: value}`; by its fields where there is but one kind."""
    if wanted[0] not in NAMES:
        return construct(wanted[0], node, where, _part)
    if isinstance(node, str):
        node = {node: {}}
    if not isinstance(node, dict) or len(node) != 1:
        raise StropError(f"{where} holds one node `name: {{fields}}`, got {quoted(node)}")
    (name, fields), known = next(iter(node.items())), NAMES[wanted[0]]
    if name not in known:
        raise StropError(f"unknown {where} {quoted(name)}; {did_you_mean(str(name), list(known))}")
    return construct(known[name], {} if fields is None else fields, f"{where}.{name}", _part)
