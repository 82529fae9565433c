"""Real text that every machine has: the Python standard library's own source.

Every `.py` file that CPython installs counts, apart from tests, installed packages, and the two
places that hold one machine's build settings. A file is held out when the hash of its relative
path says so (about 6 % of the bytes): nothing but the path matters, so the split is the same on
every machine and every CPython from 3.11 on, and survives files that are missing.

What differs between versions: the text itself. A score on it names the Python version.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path, PurePosixPath
from typing import Literal

from strop.core.errors import StropError

Split = Literal["train", "held_out"]

HELD_OUT_PERCENT = 6
"""Share of paths, in percent, whose hash puts them on the held-out side."""

_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


def stdlib_root() -> Path:
    """The folder that holds the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(relpath: str) -> bool:
    """The split rule: the first 32 bits of the path's SHA-256, modulo 100, fall below 6.

    `relpath` is relative to the standard library and has forward slashes.
    """
    digest = hashlib.sha256(relpath.encode()).hexdigest()
    return int(digest[:8], 16) % 100 < HELD_OUT_PERCENT


def belongs(relpath: str) -> bool:
    """Whether a path is part of the corpus: source, no test, no record of one machine's build."""
    path = PurePosixPath(relpath)
    if path.suffix != ".py" or not _SKIPPED.isdisjoint(path.parts[:-1]):
        return False
    return not (path.parts[0].startswith("config-") or path.name.startswith("_sysconfigdata"))


def relative_paths(split: Split, root: Path | None = None) -> list[str]:
    """Sorted paths of one side, relative to `root` (default: this interpreter's library)."""
    if split not in ("train", "held_out"):
        raise StropError(f"The split {split!r} does not exist; take 'train' or 'held_out'.")
    base = root or stdlib_root()
    kept = [r for r in _sources(base) if is_held_out(r) == (split == "held_out")]
    if not kept:
        raise StropError(f"No Python source was found in {base}; name a standard library folder.")
    return kept


def _sources(base: Path) -> list[str]:
    """Sorted paths of the corpus below `base`; skipped folders, often large, are not entered."""
    found = []
    for folder, below, names in os.walk(base):
        below[:] = [name for name in below if name not in _SKIPPED]
        inside = Path(folder).relative_to(base)
        found += [path for name in names if belongs(path := (inside / name).as_posix())]
    return sorted(found)


def texts(split: Split, root: Path | None = None) -> dict[str, str]:
    """Relative path to text, for the files of one side that are not blank."""
    base = root or stdlib_root()
    read = {
        relpath: (base / relpath).read_bytes().decode("utf-8", errors="replace")
        for relpath in relative_paths(split, base)
    }
    return {relpath: text for relpath, text in read.items() if text.strip()}


def held_out_text(max_bytes: int | None = None, root: Path | None = None) -> list[str]:
    """Held-out documents, in a mixed order, cut when `max_bytes` of UTF-8 are reached.

    The order is by the hash of the path, so that a small `max_bytes` is no alphabetical corner.
    """
    found = texts("held_out", root)
    order = sorted(found, key=lambda relpath: hashlib.sha256(relpath[::-1].encode()).digest())
    ordered = [found[relpath] for relpath in order]
    if max_bytes is None:
        return ordered
    taken, left = [], max_bytes
    for text in ordered:
        if left <= 0:
            break
        piece = text.encode()[:left].decode("utf-8", errors="ignore")
        left -= len(text.encode())
        taken.append(piece)
    return taken
