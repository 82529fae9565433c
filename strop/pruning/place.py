"""The folder of a pruned model: made hidden beside its place, and moved there whole."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from strop.core.checkpoint import INDEX, TOLD
from strop.core.errors import StropError
from strop.core.files import scratch
from strop.prune.saved import PLAN

PAGE = "report.html"
WRITTEN = (*TOLD, PLAN, PAGE, INDEX, "preprocessor_config.json", "training.json")
"""Files that `strop prune` writes, besides weights."""


def refuse_place(source: Path, out: Path) -> None:
    """Raise StropError unless `out` is free or of an earlier run, and not the model's own folder."""
    place = out.resolve()
    if place == source.resolve() or source.resolve() in place.parents:
        raise StropError(f"{out} is the model's own folder: name another one for the result")
    if out.is_symlink() or out.is_mount() or not out.name:
        raise StropError(f"{out} cannot be replaced by a new folder: name one that does not exist yet")
    if out.exists() and not out.is_dir():
        raise StropError(f"{out} is a file: name a folder")
    held = [path.name for path in out.iterdir()] if out.is_dir() else []
    if held and not (PLAN in held and all(_ours(name) for name in held)):
        raise StropError(f"{out} holds files that `strop prune` did not write: name a new folder")


@contextmanager
def placed(out: Path) -> Iterator[Path]:
    """Yield a folder to fill, which takes the place of `out` on success and vanishes on failure.

    Raises StropError when the disk is full or the place cannot be written.
    """
    try:
        with scratch(out) as hidden:
            draft = hidden / "new"
            draft.mkdir()
            yield draft
            if any(out.iterdir()):
                os.replace(out, hidden / "old")
            os.replace(draft, out)
    except OSError as error:
        raise StropError(f"cannot write {out}: {error.strerror or error}") from error


def _ours(name: str) -> bool:
    return name in WRITTEN or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name) is not None
