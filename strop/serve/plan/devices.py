"""DEVICES.yaml: what each device needs for a block, what it holds, and the links between devices.

Times are seconds for one block, profiled on the device: prefill linear in the tokens, decode by how many
requests it decodes at once (arXiv 2606.03770, section on profiling). A block whose feed-forward part lies in
RAM has times of its own. Left out: times that depend on how long the context is.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strop.core.errors import StropError, quoted
from strop.core.files import did_you_mean
from strop.core.nodes import construct, read_yaml
from strop.serve.topology import LEAST, MOST

VERSION = 1
LARGEST_BATCH = 16
"""Requests that a device decodes at once at most."""
MOST_DEVICES = 64
UNITS = {
    "bytes": {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "bytes a second": {
        "kb/s": 125.0, "Mb/s": 125e3, "Gb/s": 125e6, "B/s": 1, "kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9,
    },
    "seconds": {"s": 1, "ms": 1e-3, "us": 1e-6},
}  # fmt: skip
"""What a plain number means, and what may stand behind one instead."""
DIMENSIONS = {
    "memory": "bytes",
    "bandwidth": "bytes a second",
    **dict.fromkeys(("rtt", "prefill_base", "prefill_token", "decode", "head"), "seconds"),
}


@dataclass(frozen=True)
class Timing:
    """Seconds that one block takes."""

    prefill_token: float
    """For each token of a prompt."""
    decode: tuple[float, ...]
    """For a step of 1, 2, ... requests."""
    prefill_base: float = 0.0
    """For a prompt, whatever its length."""

    def __post_init__(self) -> None:
        _require_positive(self, "prefill_token")
        _require_finite(self, "prefill_base")
        _require_steps("decode", self.decode)
        if min(self.decode) < LEAST:
            raise ValueError(f"decode must be above 0 s, {LEAST:g} at least, for every batch size")

    def prefill(self, tokens: float) -> float:
        """Seconds for a prompt."""
        return self.prefill_base + self.prefill_token * tokens


@dataclass(frozen=True)
class Offload(Timing):
    """Seconds that a block takes whose feed-forward part lies in RAM, of which there are `memory` bytes."""

    memory: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "memory")


@dataclass(frozen=True)
class Device:
    """One device as the planner knows it."""

    name: str
    memory: float
    """Bytes for weights and KV."""
    block: Timing
    head: tuple[float, ...]
    """Seconds of language-model head and output layer for 1, 2, ... requests."""
    offload: Offload | None = None
    types: Mapping[str, Timing] = field(default_factory=dict)
    """Layer types that take another time than `block`, such as sliding_attention."""

    def __post_init__(self) -> None:
        _require_positive(self, "memory")
        _require_steps("head", self.head)
        if self.offload is not None:
            _require_slower(self.offload, self.block)

    @property
    def batch(self) -> int:
        """The largest batch that it was profiled with."""
        parts = (self.block, *self.types.values(), *((self.offload,) if self.offload else ()))
        return min(len(self.head), *(len(part.decode) for part in parts), LARGEST_BATCH)


@dataclass(frozen=True)
class Link:
    """A way between two devices."""

    bandwidth: float
    """Bytes a second."""
    rtt: float = 0.0
    """Seconds there and back."""

    def __post_init__(self) -> None:
        _require_positive(self, "bandwidth")
        _require_finite(self, "rtt")

    def seconds(self, nbytes: float) -> float:
        """From the first byte sent to the last received."""
        return nbytes / self.bandwidth + self.rtt / 2


@dataclass(frozen=True)
class Links:
    """All ways: one kind for all pairs but those named."""

    default: Link
    pairs: Mapping[frozenset[str], Link] = field(default_factory=dict)

    def between(self, one: str, other: str) -> Link:
        """The way between two devices."""
        return self.pairs.get(frozenset((one, other)), self.default)

    def to_dict(self) -> dict[str, Any]:
        """As files say it."""
        pairs = [{"between": sorted(pair), **vars(link)} for pair, link in self.pairs.items()]
        return vars(self.default) | ({"pairs": pairs} if pairs else {})


def read_devices(path: Path) -> tuple[list[Device], Links]:
    """Devices and links of a DEVICES.yaml. Raises StropError for anything wrong in it."""
    data = mapping(read_yaml(path, "devices"), str(path), ("strop_devices", "links", "devices"))
    if data["strop_devices"] != VERSION:
        raise StropError(
            f"{path} starts with `strop_devices: {VERSION}`, got {quoted(data['strop_devices'])}"
        )
    nodes = data["devices"]
    if not isinstance(nodes, dict) or not 1 <= len(nodes) <= MOST_DEVICES:
        raise StropError(f"`devices` of {path} names 1 to {MOST_DEVICES} devices, each with its profile")
    devices = [parse_device(str(name), node) for name, node in nodes.items()]
    return devices, parse_links(data["links"], [device.name for device in devices])


def parse_device(name: str, node: Any) -> Device:
    """A device from its entry."""
    node = mapping(node, f"device {name}", ("memory", "block", "head"), ("offload", "types"))
    where = f"device {name}"
    types = node.get("types", {})
    if not isinstance(types, dict):
        raise StropError(f"types of {where} maps layer types to times of a block, got {quoted(types)}")
    offload = node.get("offload")
    head = node["head"] if isinstance(node["head"], list) else [node["head"]] * LARGEST_BATCH
    try:
        return Device(
            name,
            quantity(f"{where}: memory", node["memory"], "bytes"),
            _timing(Timing, node["block"], f"{where}: block"),
            tuple(quantity(f"{where}: head", one, "seconds") for one in head),
            None if offload is None else _timing(Offload, offload, f"{where}: offload"),
            {str(kind): _timing(Timing, times, f"{where}: types.{kind}") for kind, times in types.items()},
        )
    except ValueError as error:
        raise StropError(f"{where}: {error}") from error


def parse_links(node: Any, names: Sequence[str]) -> Links:
    """Links from their entry; pairs are of known names."""
    node = mapping(node, "links", ("bandwidth",), ("rtt", "pairs"))
    found = {}
    pairs = node.get("pairs", [])
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        pair = mapping(pair, "links.pairs", ("between", "bandwidth"), ("rtt",))
        ends = list(map(str, pair["between"])) if isinstance(pair["between"], list) else []
        if len(ends) != 2 or ends[0] == ends[1]:
            raise StropError(f"links.pairs: between names two devices, got {quoted(pair['between'])}")
        for end in ends:
            if end not in names:
                raise StropError(f"links.pairs: no device {quoted(end)}; {did_you_mean(end, list(names))}")
        found[frozenset(ends)] = _link(pair, f"link between {ends[0]} and {ends[1]}")
    return Links(_link(node, "links"), found)


def _link(node: Mapping[str, Any], where: str) -> Link:
    said = {key: node[key] for key in ("bandwidth", "rtt") if key in node}
    return construct(Link, _plain(said, where), where, _nothing)


def _timing(kind: type, node: Any, where: str) -> Any:
    required = ("prefill_token", "decode")
    optional = ("prefill_base", *(("memory",) if kind is Offload else ()))
    return construct(kind, _plain(mapping(node, where, required, optional), where), where, _nothing)


def _plain(node: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The same with quantities as numbers."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        dimension = DIMENSIONS[key]
        if isinstance(value, list):
            found[key] = [quantity(f"{where}.{key}", one, dimension) for one in value]
        else:
            found[key] = quantity(f"{where}.{key}", value, dimension)
    return found


def _nothing(where: str, node: Any, kinds: tuple[type, ...]) -> Any:
    raise StropError(f"{where} holds no object, got {quoted(node)}")


def mapping(node: Any, where: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """A mapping that has the required keys and no unknown ones."""
    if not isinstance(node, dict):
        raise StropError(f"{where} is a mapping of {', '.join((*required, *optional))}, got {quoted(node)}")
    known = [*required, *optional]
    for key in node:
        if key not in known:
            raise StropError(f"{where} has no field {quoted(key)}; {did_you_mean(str(key), known)}")
    for key in required:
        if key not in node:
            raise StropError(f"{where} lacks {key!r}: it has {', '.join(known)}")
    return node


def quantity(where: str, value: Any, dimension: str) -> float:
    """A number up to `MOST`, plain or with a unit such as `12 GB`, `920 Mb/s` or `1.6 ms`."""
    units = UNITS[dimension]
    match = re.fullmatch(r"\s*([-+\d.eE]+)\s*([A-Za-z/]+)\s*", value) if isinstance(value, str) else None
    try:
        if match and match[2] in units:
            number = float(match[1]) * units[match[2]]
        else:
            number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= MOST:
        raise StropError(
            f"{where} is a number of {dimension}, or one with a unit out of {', '.join(units)}, "
            f"up to {MOST:g}, got {quoted(value)}"
        )
    return number


def _require_positive(one: Any, *names: str) -> None:
    for name in names:
        if not getattr(one, name) >= LEAST:
            raise ValueError(f"{name} must be above 0, {LEAST:g} at least, got {getattr(one, name):g}")


def _require_finite(one: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(one, name) < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(one, name):g}")


def _require_steps(name: str, steps: Sequence[float]) -> None:
    if not 1 <= len(steps) <= LARGEST_BATCH or not all(0 <= step < math.inf for step in steps):
        raise ValueError(f"{name} has 1 to {LARGEST_BATCH} finite times of at least 0 s, one a batch size")


def _require_slower(offload: Timing, block: Timing) -> None:
    """As few blocks as possible are offloaded, which is best only if these are not faster."""
    pairs = [
        (offload.prefill_base, block.prefill_base),
        (offload.prefill_token, block.prefill_token),
        *zip(offload.decode, block.decode, strict=False),
    ]
    if any(there < here for there, here in pairs):
        raise ValueError(
            "a block with its feed-forward part in RAM is not faster than without: profile again"
        )
