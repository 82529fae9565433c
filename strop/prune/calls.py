"""One operation as the rules see it: tensors as dimensions made of atoms, and what stays as it is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from strop.prune.axes import Dim, freeze, fresh, unify

Dims = tuple[Dim, ...]


class Kind(IntEnum):
    """What a tensor was made of; of several operands the highest counts."""

    CONSTANT = 0
    WEIGHT = 1
    INPUT = 2
    """The model's input, which no parameter has been multiplied with."""
    ACTIVE = 3


@dataclass(frozen=True)
class Value:
    """A tensor as the trace sees it."""

    dims: Dims
    kind: Kind


@dataclass
class Call:
    """One operation: its arguments by name, the shape of its first result, and where roles are noted."""

    name: str
    args: dict[str, Any]
    shape: tuple[int, ...]
    roles: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """Why what this operation reads is frozen."""
        return f"aten.{self.name} reads it whole"

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def values(self) -> list[Value]:
        """All tensors among the arguments."""
        lists = (arg if isinstance(arg, (list, tuple)) else [arg] for arg in self.args.values())
        return [value for values in lists for value in values if isinstance(value, Value)]


Rule = Callable[[Call], Dims]


def indices(call: Call, value: Value) -> list[int]:
    """The dimensions that an operation works along; all where it does not say."""
    given = call.args.get("dim", call.args.get("dims"))
    given = [given] if isinstance(given, int) else given
    rank = len(value.dims)
    return [index % rank for index in given] if given and rank else list(range(rank))


def fixed_dim(call: Call, dim: Dim, length: int) -> Dim:
    """Freeze a dimension that an operation reads whole; returns that of the result, frozen too."""
    freeze(dim, call.reason)
    new = fresh(length)
    freeze(new, call.reason)
    return new


def frozen(call: Call) -> Dims:
    """An operation that nothing is known of: whatever it reads stays."""
    for value in call.values():
        for dim in value.dims:
            freeze(dim, call.reason)
    return tuple(fixed_dim(call, (), length) for length in call.shape)


def broadcast(one: Dims, other: Dims, adds: bool = False) -> Dims:
    """The dimensions of an elementwise result."""
    rank = max(len(one), len(other))
    one, other = ((),) * (rank - len(one)) + one, ((),) * (rank - len(other)) + other
    return tuple(unify(a, b, adds) if a and b else a or b for a, b in zip(one, other, strict=True))
