"""Objects from YAML, strictly: a mapping of fields becomes a dataclass, or one sentence says why not."""

import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from strop.core.errors import UNREAD, StropError, quoted, reason
from strop.core.files import did_you_mean
from strop.core.method import Method

Nested = Callable[[str, Any, tuple[type, ...]], Any]
"""From where a node stands, the node and the types that may stand there, to an object."""


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few of them, nested, would stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not part of a recipe; write the values out")
        return super().compose_node(parent, index)


_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)
"""PyYAML takes 1e9 for text: YAML 1.1 wants 1.0e+9."""
MOST_BYTES = 16 << 20
"""Of a file of YAML."""


def require_file(path: Path, what: str, most: int) -> None:
    """Raise StropError for no regular file, or one above so many bytes; OSError where there is nothing."""
    if path.exists() and not path.is_file():
        raise StropError(f"cannot read {what} {path}: it is a folder or a device; give a file")
    size = path.stat().st_size
    if size > most:
        raise StropError(f"{path} has {size >> 20} MiB, over the limit of {most >> 20}: give a part of it")


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds. Raises StropError; `what` says what the file is."""
    try:
        require_file(path, what, MOST_BYTES)
        return yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except OSError as error:
        raise StropError(f"cannot read {what} {path}: {error.strerror}") from error
    except (yaml.YAMLError, RecursionError, *UNREAD) as error:
        raise StropError(f"{path} is not YAML: {reason(error)}") from error


def construct(
    kind: type,
    fields: Any,
    where: str,
    nested: Nested,
    what: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> Any:
    """An object of a dataclass from its fields, each of the type that the class says.

    A field that takes a method, a dataclass or an abstract class is given to `nested`. Raises StropError for
    anything else; `what` names the object where the class itself refuses, `given` are fields that are objects
    already.
    """
    if not isinstance(fields, dict):
        raise StropError(f"{what or where} takes `field: value` pairs, got {quoted(fields)}")
    hints, known = typing.get_type_hints(kind), list(inspect.signature(kind).parameters)
    values = dict(given or {})
    for key, value in fields.items():
        if key not in known:
            raise StropError(f"{where} has no field {quoted(key)}; {did_you_mean(str(key), known)}")
        hint = hints[key].type if isinstance(hints[key], dataclasses.InitVar) else hints[key]
        inner = tuple(one for one in kinds(hint) if _is_object(one))
        if isinstance(value, (dict, str)) and inner:
            values[key] = nested(f"{where}.{key}", value, inner)
        else:
            values[key] = scalar(f"{where}.{key}", value, hint)
    try:
        return kind(**values)
    except (ValueError, TypeError, OverflowError) as error:
        raise StropError(f"{what or where}: {reason(error)}") from error


def _is_object(kind: Any) -> bool:
    if not isinstance(kind, type):
        return False
    return issubclass(kind, Method) or dataclasses.is_dataclass(kind) or inspect.isabstract(kind)


def kinds(hint: Any) -> tuple[type, ...]:
    """The types that a field may have."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType, tuple)
    return typing.get_args(hint) if union else (hint,)


def scalar(where: str, value: Any, hint: Any) -> Any:
    """A value of the type that a field has; whole numbers serve as others."""
    allowed = kinds(hint)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(scalar(where, item, allowed[0]) for item in value)
    if float in allowed and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if type(value) not in allowed:
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
        raise StropError(f"{where} must be {names}, got {quoted(value)}")
    return value
