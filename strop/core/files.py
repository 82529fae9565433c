"""Files that are either whole or absent, and names for what they hold."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path
from typing import Any

from strop.core.errors import StropError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that replaces it on success and vanishes on failure.

    Raises StropError when the place cannot be written or the disk is full.
    """
    handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise StropError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if handle is not None:
            Path(name).unlink(missing_ok=True)


def require_folder(path: Path) -> None:
    """Raise StropError unless `path` is, or could be made, a folder to write in. Leaves nothing behind."""
    place = path.absolute()
    while not (place.exists() or place.is_symlink()):
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".strop."):
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
