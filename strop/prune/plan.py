"""A prune plan: how many channels each unit keeps, what was tried to find out, and a file to edit by hand.

Kept counts are what counts: rates round differently from width to width, so none is followed. Which channels
stay is read from the dense model by the plan's score, and a plan is of one model alone.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from strop.core.errors import StropError, quoted
from strop.core.files import atomic
from strop.core.nodes import construct, read_yaml
from strop.prune.cut import cut
from strop.prune.score import by_name, keep
from strop.prune.search import Candidate, Try, require_seed, require_shares
from strop.prune.trace import trace
from strop.prune.units import Example, Units

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One unit, in network order."""

    name: str
    width: int
    """Channels in all."""
    heads: int = 1
    """Parts that keep equally many."""
    kept: int
    """Channels that stay: change it by hand to change the plan."""
    planned: int
    """Channels that the planner kept."""
    parameters: int
    """What would go with all of its channels: producers' rows, norms, consumers' columns."""
    where: str
    """"block" or "stem"."""
    verdict: str = ""
    """What the planner made of it, or why it was left whole."""

    def __post_init__(self) -> None:
        if min(self.width, self.heads) < 1 or self.width % self.heads:
            raise ValueError(f"{self.width} channels do not divide into {self.heads} heads")
        for name in ("kept", "planned"):
            count = getattr(self, name)
            if not 1 <= count <= self.width or count % self.heads:
                every = f", a multiple of {self.heads}" if self.heads > 1 else ""
                raise ValueError(f"{name} must be 1 to {self.width}{every}, got {count}")


PARTS: dict[str, type] = {
    "rows": Row,
    "curves": Try,
    "sensitivity": Try,
    "walk": Try,
    "candidates": Candidate,
}
"""What a plan lists."""


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """Immutable; numbers are of the data that `evaluate` saw, and None where none was given."""

    method: str
    """The name of the planner."""
    settings: str = ""
    """Its settings, for people."""
    score: str = "l2"
    """What ranks the channels of a unit."""
    seed: int = 0
    """Of a random score, and of how data was parted."""
    model: str
    """Names the dense model by its weights."""
    parameters: int
    """P: all parameters of the dense model."""
    dense_accuracy: float | None = None
    """A0."""
    accuracy: float | None = None
    """Of the model as planned, without recovery."""
    saving: float
    """S = 1 - P'/P as planned."""
    feasible: bool = True
    """Whether what was asked for is met; otherwise this is the nearest that keeps the tolerance."""
    evaluations: int = 0
    """How often a model was evaluated."""
    rows: tuple[Row, ...]
    frozen: tuple[tuple[str, str], ...] = ()
    """What cannot be cut, and why."""
    curves: tuple[Try, ...] = ()
    """All units, or those in blocks, cut alike."""
    sensitivity: tuple[Try, ...] = ()
    """One unit cut alone."""
    walk: tuple[Try, ...] = ()
    """The steps towards the plan in order, each with all that was accepted before it."""
    candidates: tuple[Candidate, ...] = ()
    """Of all maps tried those that no other beats in both accuracy and saving."""

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} has two rows: keep one of them")
        if any(len(candidate.kept) != len(names) for candidate in self.candidates):
            raise ValueError(
                f"candidates have one count for each of {len(names)} rows: to leave a unit whole, set its "
                "`kept` to its width instead of taking the row out"
            )
        require_seed(self.seed)
        require_shares(self.saving, *(a for a in (self.dense_accuracy, self.accuracy) if a is not None))

    @property
    def counts(self) -> dict[str, int]:
        """Channels that stay, by unit."""
        return {row.name: row.kept for row in self.rows}

    @property
    def edited(self) -> bool:
        """Whether somebody changed counts: accuracy and saving are of the plan as it was."""
        return any(row.kept != row.planned for row in self.rows)

    def apply(
        self, model: nn.Module, units: Units | None = None, example: Example | None = None
    ) -> nn.Module:
        """The dense model cut once; `model` stays as it is. `units` are those of `trace`, or found anew.

        `example` are keyword inputs of a small forward pass, where units are to be found.

        Raises StropError for another model than the plan was made for, and for units that it does not have.
        """
        if fingerprint(model) != self.model:
            raise StropError(
                f"this plan is of another model (weights {quoted(self.model)}): apply it to the dense model "
                "that it was made from, or plan again"
            )
        units = trace(model, example) if units is None else units
        score, kept = by_name(self.score, self.seed), {}
        for row in self.rows:
            unit = units[row.name]
            if (unit.width, unit.heads) != (row.width, row.heads):
                raise StropError(
                    f"{row.name} has {unit.width} channels in {unit.heads} heads, and {row.width} in "
                    f"{row.heads} in the plan: change `kept` alone"
                )
            if row.kept < row.width:
                kept[row.name] = keep(score(model, unit), row.kept, row.heads)
        return cut(model, units, kept)

    def to_dict(self) -> dict[str, Any]:
        """The plan as its file says it."""
        plain = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {"strop_prune": VERSION} | plain

    def to_yaml(self) -> str:
        """The plan as text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=1000)

    def save(self, path: Path) -> None:
        """Write the plan, whole or not at all."""
        with atomic(path) as temporary:
            temporary.write_text(self.to_yaml(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "PrunePlan":
        """Read a plan file. Raises StropError with one sentence for anything wrong in it."""
        return cls.from_dict(read_yaml(path, "plan"))

    @classmethod
    def from_dict(cls, data: Any) -> "PrunePlan":
        """Parse what `to_dict` writes. Raises StropError with one sentence."""
        if not isinstance(data, dict) or data.get("strop_prune") != VERSION:
            raise StropError(f"a prune plan is a mapping that starts with `strop_prune: {VERSION}`")
        head = {key: value for key, value in data.items() if key != "strop_prune"}
        lists: dict[str, Any] = {}
        for name, kind in PARTS.items():
            nodes = enumerate(_list(name, head.pop(name, [])), 1)
            lists[name] = tuple(_object(kind, node, f"{name} {number}") for number, node in nodes)
        lists["frozen"] = tuple(_pair(node) for node in _list("frozen", head.pop("frozen", [])))
        plan: PrunePlan = construct(cls, head, "the plan", _refused, given=lists)
        return plan


def fingerprint(model: nn.Module) -> str:
    """16 hex digits that name a model by the names, types, shapes and bytes of its parameters and buffers."""
    digest = blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """With mappings and lists alone, which YAML has words for."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _list(name: str, node: Any) -> Sequence[Any]:
    if not isinstance(node, list):
        raise StropError(f"`{name}` in the plan is a list, got {quoted(node)}")
    return node


def _object(kind: type, node: Any, where: str) -> Any:
    """A row, a try or a candidate; a row that is wrong is named by its unit."""
    name = node.get("name") if isinstance(node, dict) else None
    return construct(kind, node, name if isinstance(name, str) else where, _refused)


def _pair(node: Any) -> tuple[str, str]:
    if not (isinstance(node, list) and len(node) == 2 and all(isinstance(part, str) for part in node)):
        raise StropError(f"`frozen` in the plan lists names with reasons, got {quoted(node)}")
    return node[0], node[1]


def _refused(where: str, node: Any, wanted: tuple[type, ...]) -> Any:
    raise StropError(f"{where} cannot be {quoted(node)}")
