"""Files that are either whole or absent, and names for what they hold."""

import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from strop.core.errors import StropError

PART = ".part"
"""How the names of what is not yet whole end."""
DRAWN = rf"[0-9a-f]{{8}}\.[a-z0-9_]{{8}}{re.escape(PART)}"
"""What follows the name of the whole: the machine, and what tempfile draws."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path in a scratch folder, whose file replaces `path` on success and vanishes on failure.

    Raises StropError when the place cannot be written or the disk is full.
    """
    if path.exists() and not path.is_file():
        raise StropError(f"cannot write {path}: it is a folder or a device; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch(path) as folder:
            temporary = folder / path.name
            yield temporary
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise StropError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder against other runs, where the file system has locks; one made for it goes if unused.

    Raises StropError when another run holds it.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StropError(f"cannot write in {folder} ({error.strerror}): name another folder") from error
    try:
        with suppress(OSError):
            _lock(handle, folder)
        yield
    finally:
        if made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StropError(
            f"another run is at work in {folder}: wait for it, or name another folder"
        ) from error


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that vanishes in the end.

    It is locked for as long as its owner lives, where the file system has locks; what killed processes of
    this machine left of the same path goes first.
    """
    sweep(path)
    handle, folder = _claimed(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def sweep(path: Path) -> None:
    """Remove what killed processes of this machine left of `path`, which may be whole by now."""
    for other in path.parent.iterdir():
        if other.name.startswith(_prefix(path)) and is_part_of(other, path):
            _sweep(other)


def is_part_of(temporary: Path, path: Path) -> bool:
    """Whether that is what a run left, or has, of `path` while it is not yet whole."""
    return re.fullmatch(re.escape(f".{path.name}.") + DRAWN, temporary.name) is not None


def _prefix(path: Path) -> str:
    """How the names of scratch folders of this machine begin: locks may not be seen from another."""
    return f".{path.name}.{digest(socket.gethostname())[:8]}."


def _claimed(path: Path) -> tuple[int, Path]:
    """A new scratch folder, and a handle that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(PART, _prefix(path), path.parent))
        with suppress(FileNotFoundError):  # swept by somebody else before it was locked
            handle = os.open(folder, os.O_RDONLY)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.exists():
                return handle, folder
            os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove a scratch folder, unless its owner lives or nobody can tell."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
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
