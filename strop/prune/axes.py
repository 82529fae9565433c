"""Which axes hold the same channels: atoms, joined into classes and split into factors.

A dimension of a tensor is a tuple of atoms, row-major, and one of size 1 is the empty tuple. Joining two
atoms puts them into one class; splitting an atom splits its whole class, so that heads found anywhere are
heads everywhere. A class that must not be cut is frozen, with the reason.
"""

from collections.abc import Iterable, Sequence
from math import prod

Dim = tuple["Atom", ...]
"""What a dimension is made of."""


class Atom:
    """A factor of a dimension; those that must keep the same entries are in one class.

    The attributes after `axis` belong to the class: ask `root`.
    """

    __slots__ = ("axis", "first", "frozen", "parent", "parts", "produced", "size", "stream")

    def __init__(self, size: int, axis: tuple[str, int] | None = None) -> None:
        self.size = size
        self.axis = axis
        """The tensor's name and the dimension, where this is an axis of a parameter or buffer."""
        self.parent: Atom | None = None
        self.parts: Dim | None = None
        """What it was split into: of a root for the class, of another atom its own share of that."""
        self.frozen: str | None = None
        """Why the class cannot be cut."""
        self.produced = False
        """Whether a parameter makes these channels."""
        self.first = False
        """Whether such a parameter reads the model's input."""
        self.stream = False
        """Whether an addition joined channels of two producers here."""


def root(atom: Atom) -> Atom:
    """The atom that stands for the class."""
    while atom.parent is not None:
        if atom.parent.parent is not None:
            atom.parent = atom.parent.parent
        atom = atom.parent
    return atom


def leaves(dim: Iterable[Atom]) -> list[Atom]:
    """The atoms of a dimension, each replaced by what it has been split into."""
    found = []
    for atom in dim:
        whole = root(atom)
        if whole.parts is None:
            found.append(atom)
            continue
        if atom.parts is None:
            atom.parts = tuple(Atom(part.size, atom.axis) for part in whole.parts)
            for own, part in zip(atom.parts, whole.parts, strict=True):
                own.parent = root(part)
        found += leaves(atom.parts)
    return found


def size(dim: Dim) -> int:
    """Length of a dimension."""
    return prod(atom.size for atom in dim)


def fresh(length: int) -> Dim:
    """A dimension that nothing is known of."""
    return (Atom(length),) if length != 1 else ()


def freeze(dim: Iterable[Atom], reason: str) -> None:
    """Say why the classes of a dimension cannot be cut; the first reason stays."""
    for atom in leaves(dim):
        root(atom).frozen = root(atom).frozen or reason


def unify(one: Dim, other: Dim, adds: bool = False) -> Dim:
    """Put two dimensions of one length into the same classes, split where factors differ; returns `one`.

    Where an addition joins two classes that each have a producer, the class is a residual stream. Factors
    that cannot be lined up, as 2 x 3 and 3 x 2, are frozen.
    """
    ours, theirs = leaves(one), leaves(other)
    while ours and theirs:
        a, b = ours[0], theirs[0]
        if a.size == b.size:
            _join(a, b, adds)
            del ours[0], theirs[0]
        elif a.size % b.size == 0:
            _split(a, b.size)
        elif b.size % a.size == 0:
            _split(b, a.size)
        else:
            freeze(ours + theirs, f"{size(one)} channels are read in two ways that do not fit together")
            break
        ours, theirs = leaves(ours), leaves(theirs)
    return one


def regroup(atoms: Iterable[Atom], sizes: Sequence[int]) -> list[Dim] | None:
    """The same atoms as dimensions of other lengths, split where needed; None where they cannot be."""
    rest, dims = leaves(atoms), []
    for length in sizes:
        dim: list[Atom] = []
        while (missing := length // size(tuple(dim))) > 1:
            if not rest:
                return None
            if missing % rest[0].size == 0:
                dim.append(rest.pop(0))
            elif rest[0].size % missing == 0:
                _split(rest[0], missing)
                rest, dim = leaves(rest), leaves(dim)
            else:
                return None
        dims.append(tuple(dim))
    return None if rest else dims


def _join(one: Atom, other: Atom, adds: bool) -> None:
    a, b = root(one), root(other)
    if a is b:
        return
    b.parent = a
    a.stream |= b.stream or (adds and a.produced and b.produced)
    a.frozen = a.frozen or b.frozen
    a.produced |= b.produced
    a.first |= b.first


def _split(atom: Atom, outer: int) -> None:
    """Split the whole class of an atom into (outer, the rest)."""
    whole = root(atom)
    whole.parts = (Atom(outer, whole.axis), Atom(whole.size // outer, whole.axis))
    for part in whole.parts:
        part.frozen, part.produced = whole.frozen, whole.produced
        part.first, part.stream = whole.first, whole.stream
