"""From classes of axes to units: which can be cut, with which heads, and what they are called."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from strop.prune.axes import Atom, Dim, freeze, leaves, root
from strop.prune.rules import WINDOW
from strop.prune.units import Axis, Unit

Place = tuple[str, int]
"""A tensor's name and one of its dimensions."""


@dataclass(frozen=True)
class Held:
    """An axis of a parameter or buffer and the classes that it is made of, row-major."""

    place: Place
    classes: tuple[Atom, ...]


class Groups:
    """The classes that a trace has left, and the axes that hold them."""

    def __init__(self, model: nn.Module, axes: Mapping[Place, Dim], roles: Mapping[Place, str]) -> None:
        self.roles = roles
        self.axes = [Held(place, tuple(map(root, leaves(dim)))) for place, dim in axes.items()]
        self.parameters = {name for name, _ in model.named_parameters()}
        self._lists = [f"{n}." for n, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        self._order = {place: index for index, place in enumerate(roles)}
        self._of: dict[Atom, list[Held]] = defaultdict(list)
        for held in self.axes:
            for atom in dict.fromkeys(held.classes):
                self._of[atom].append(held)
                if held.classes.count(atom) > 1:
                    freeze([atom], f"{held.place[0]} holds it twice in one axis")

    def free(self) -> list[Atom]:
        """Classes that something makes and nothing fixes, in the order to try them.

        Widths inside heads come first, and of heads and repeats on one axis what more axes hold; those alike
        are together.
        """

        def order(atom: Atom) -> tuple[bool, int, int, list[Place]]:
            shape = [(held.place[0].rpartition(".")[2], held.place[1]) for held in self._of[atom]]
            return self._heads(atom) is None, -len(shape), atom.size, shape

        return sorted((a for a in self._of if a.frozen is None and a.produced), key=order)

    def options(self, atom: Atom) -> list[Unit]:
        """Units to try of a class: other channels in each of the heads beside it, or the same in all."""
        heads = self._heads(atom)
        return [self._unit(atom, each) for each in ((heads, None) if heads else (None,))]

    def use(self, places: Iterable[Place]) -> int:
        """When the first of these axes that makes or reads channels is used."""
        return min(self._order.get(place, len(self._order)) for place in places)

    def unused(self, cut: Iterable[Unit], failed: Iterable[Unit]) -> Iterator[tuple[str, str]]:
        """Axes of parameters that none of the units cuts, and why."""
        seen = {place for unit in cut for place in unit.places()}
        lost = {place: unit.name for unit in failed for place in unit.places()}
        for held in self.axes:
            name, dim = held.place
            reasons = [atom.frozen for atom in held.classes if atom.frozen]
            if held.place in seen or name not in self.parameters or WINDOW in reasons:
                continue
            if held.place in lost:
                yield f"{name}[{dim}]", f"it belongs to {lost[held.place]}, which cannot be cut"
            else:
                yield f"{name}[{dim}]", (reasons or ["no parameter makes these channels on the example"])[0]

    def _heads(self, atom: Atom) -> Atom | None:
        """The outermost free class that every axis holds outside of this one, the innermost."""
        first, *others = (held.classes for held in self._of[atom])
        beside = (
            other
            for other in first[:-1]
            if other.frozen is None and all(other in axis[:-1] for axis in others)
        )
        return next(beside, None) if all(axis[-1] is atom for axis in (first, *others)) else None

    def _unit(self, atom: Atom, heads: Atom | None) -> Unit:
        axes = tuple(self._axis(held, atom, heads) for held in self._of[atom])
        path = common(axis.tensor for axis in axes)
        inside = any(f"{path}.".startswith(prefix) and f"{path}." != prefix for prefix in self._lists)
        return Unit(
            name=path,
            width=atom.size * (heads.size if heads else 1),
            heads=heads.size if heads else 1,
            kind="stream" if atom.stream else "inner",
            where="block" if inside else "stem",
            first=atom.first,
            axes=axes,
        )

    def _axis(self, held: Held, atom: Atom, heads: Atom | None) -> Axis:
        own = [held.classes.index(wanted) for wanted in (heads, atom) if wanted is not None]
        factors = tuple(one.size for one in held.classes)
        return Axis(*held.place, factors, tuple(own), self.roles.get(held.place, "tied"))


def common(tensors: Iterable[str]) -> str:
    """The longest path of a module that holds all of these tensors."""
    paths = [name.split(".")[:-1] for name in tensors]
    shared = []
    for parts in zip(*paths, strict=False):
        if len({*parts}) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def named(units: list[Unit], short: bool = True) -> list[Unit]:
    """The same units with names that tell them apart; `short` leaves out what need not be said for that."""
    alike = Counter((unit.name, unit.kind) for unit in units)
    full = [
        replace(unit, name=_full(unit, short and alike[unit.name, unit.kind] == 1 and bool(unit.name)))
        for unit in units
    ]
    again, seen = Counter(unit.name for unit in full), Counter()
    for index, unit in enumerate(full):
        seen[unit.name] += 1
        if again[unit.name] > 1:
            full[index] = replace(unit, name=f"{unit.name}.{seen[unit.name]}")
    return full


def _full(unit: Unit, alone: bool) -> str:
    """The module's path, with `stream` or what makes the channels where the path does not say it."""
    if unit.kind == "stream":
        return ".".join(filter(None, (unit.name, "stream")))
    if alone:
        return unit.name
    start = len(unit.name) + 1 if unit.name else 0
    makers = (axis.tensor[start:].split(".")[0] for axis in unit.axes if axis.role == "producer")
    parts = [*dict.fromkeys(makers)]
    letters = all(len(part) == 1 and part.isalpha() for part in parts)
    return ".".join(filter(None, (unit.name, ("" if letters else "+").join(parts))))
