"""What a method's source says of its fields: type, default, and the docstring under each."""

import ast
import functools
import inspect
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from strop.core.method import Method


@dataclass(frozen=True)
class Field:
    """One field as people read it."""

    name: str
    type: str
    default: str
    text: str
    methods: tuple[type, ...]
    """Where it holds another method: of which kinds."""


@functools.cache
def declared(kind: type) -> dict[str, tuple[str, str]]:
    """Type and docstring of each field that a class declares itself."""
    tree = ast.parse(inspect.getsource(sys.modules[kind.__module__]))
    body = next(
        node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__
    )
    found = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            told = after.value if isinstance(after, ast.Expr) else None
            text = told.value if isinstance(told, ast.Constant) and isinstance(told.value, str) else ""
            found[node.target.id] = (_plain(node.annotation), " ".join(text.split()))
    return found


def fields(kind: type) -> Iterator[Field]:
    """The fields of a method in order; a docstring that a class leaves out is its parent's."""
    hints = typing.get_type_hints(kind)
    homes = [declared(home) for home in kind.__mro__ if home.__module__.startswith("strop.")]
    for name, parameter in inspect.signature(kind).parameters.items():
        told = [home[name] for home in homes if name in home]
        text = next((text for _, text in told if text), "")
        required = parameter.default is inspect.Parameter.empty
        default = "required" if required else f"`{parameter.default!r}`"
        yield Field(name, told[0][0], default, text, _methods(hints[name]))


def _plain(annotation: ast.expr) -> str:
    """An annotation without the wrapper that dataclasses want."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "InitVar":
        annotation = annotation.slice
    return ast.unparse(annotation)


def _methods(hint: object) -> tuple[type, ...]:
    kinds = typing.get_args(hint) or (hint,)
    return tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Method))
