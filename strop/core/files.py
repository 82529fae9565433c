"""Files that are either whole or absent, and names for what they hold."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from strop.core.errors import StropError

PART = ".part"
"""How the names of what is not yet whole end."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that replaces it on success and vanishes on failure.

    What a killed process left is swept away. Raises StropError when the place cannot be written or the disk
    is full.
    """
    handle = None
    try:
        if path.exists() and not path.is_file():
            raise StropError(f"cannot write {path}: it is a folder or a device; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _claimed(path, _new_file)
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise StropError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        if handle is not None:
            temporary.unlink(missing_ok=True)
            os.close(handle)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that vanishes in the end; what a killed run left goes too."""
    handle, temporary = _claimed(path, _new_folder)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def is_part_of(temporary: Path, path: Path) -> bool:
    """Whether that is what a run left, or has, of `path` while it is not yet whole."""
    name, prefix = temporary.name, f".{path.name}."
    return name.startswith(prefix) and name.endswith(PART) and len(name) > len(prefix + PART)


def _new_file(place: Path, prefix: str) -> tuple[int, str]:
    return tempfile.mkstemp(PART, prefix, place)


def _new_folder(place: Path, prefix: str) -> tuple[int, str]:
    name = tempfile.mkdtemp(PART, prefix, place)
    return os.open(name, os.O_RDONLY), name


def _claimed(path: Path, new: Callable[[Path, str], tuple[int, str]]) -> tuple[int, Path]:
    """A new temporary sibling of `path`, locked for as long as its owner lives; those of the dead go."""
    for other in path.parent.iterdir():
        if is_part_of(other, path):
            _sweep(other)
    while True:
        handle, name = new(path.parent, f".{path.name}.")
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(name):
            return handle, Path(name)
        os.close(handle)  # swept by somebody else before it was locked


def _sweep(other: Path) -> None:
    """Remove a temporary file or folder, unless its owner lives."""
    with suppress(OSError):
        handle = os.open(other, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other) if other.is_dir() else other.unlink()
        finally:
            os.close(handle)


def require_folder(path: Path) -> None:
    """Raise StropError unless `path` is, or could be made, a folder to write in. Leaves nothing behind."""
    place = path.absolute()
    while not (place.exists() or place.is_symlink()):
        place = place.parent
    try:
        with scratch(place / "strop"):
            pass
    except OSError as error:
        reason = "it is a file" if place.is_file() else error.strerror or error
        raise StropError(f"cannot write in {place} ({reason}): name another folder") from error


def digest(*parts: Any) -> str:
    """16 hex digits that name JSON-like `parts`."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def did_you_mean(name: str, known: list[str]) -> str:
    """The tail of an error about an unknown name: the closest known one, and all of them."""
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(sorted(known)) or 'none yet'}"
