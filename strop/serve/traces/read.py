"""A trace from a file, whose format shows in its first line. Whatever is wrong is told with its line."""

import os
from collections.abc import Iterator
from pathlib import Path

from strop.core.errors import StropError
from strop.core.nodes import require_file
from strop.serve.base import Job, Request
from strop.serve.traces.azure import Azure
from strop.serve.traces.base import MAX_BYTES, MAX_ROWS, FileTrace, Loader, Row
from strop.serve.traces.burstgpt import BurstGPT
from strop.serve.traces.mooncake import BLOCK, Mooncake
from strop.serve.traces.table import split


def load(path: Path | str, skip_bad: bool = False) -> FileTrace:
    """Read a Mooncake, Azure or BurstGPT trace; arrivals count from its first request.

    A bad row is refused by its line, or passed over and counted where `skip_bad`. Rows must be in order of
    time, and a block id must always follow the same id.
    """
    path = Path(path)
    lines = _lines(path)
    number, raw = next(lines, (0, b""))
    if not number:
        raise StropError(f"{path} is empty: give a trace with a request a line")
    try:
        first = _text(raw.removeprefix(b"\xef\xbb\xbf"))
        loader, is_row = _loader(first)
    except StropError as error:
        raise StropError(f"{path}, line {number}: {error}") from error
    rows = _Rows(path, loader, skip_bad)
    if is_row:
        rows.take(number, first)
    for number, raw in lines:
        if len(rows.jobs) == MAX_ROWS:
            raise StropError(f"{path} has over {MAX_ROWS} requests: give a part of it")
        rows.take(number, raw)
    if not rows.jobs:
        why = f" ({rows.refusal})" if rows.skipped else ""
        raise StropError(f"{path} has no row that is good{why}: give a trace with a request a line")
    return FileTrace(path.name, rows.jobs, BLOCK, rows.skipped, rows.refusal)


def data_root() -> Path | None:
    """The folder of published traces: $STROP_DATA, else `shared/data` beside the checkout; None without."""
    if "STROP_DATA" in os.environ:
        return Path(os.environ["STROP_DATA"])
    beside = Path(__file__).parents[4] / "shared" / "data"
    return beside if beside.is_dir() else None


class _Rows:
    """Rows that have become jobs, and what the next one must agree with."""

    def __init__(self, path: Path, loader: Loader, skip_bad: bool) -> None:
        self.jobs: list[Job] = []
        self.skipped, self.refusal = 0, ""
        self._path, self._loader, self._skip_bad = path, loader, skip_bad
        self._start = self._last = 0.0
        self._before: dict[int, int] = {}
        """By block id: the id that it follows, -1 at the start of a prompt."""

    def take(self, number: int, line: bytes | str) -> None:
        """Add a line, or pass over it. Raises StropError that says where and what."""
        try:
            self._add(self._loader.row(line if isinstance(line, str) else _text(line)))
        except StropError as error:
            place = f"{self._path}, line {number}: {error}"
            if not self._skip_bad:
                raise StropError(f"{place}: repair the row, or let bad rows be skipped") from error
            self.skipped += 1
            self.refusal = self.refusal or place

    def _add(self, row: Row) -> None:
        if not self.jobs:
            self._start = row.time
        elif row.time < self._last:
            raise StropError("its time is before that of the row above, so the trace is not in order")
        self._chain(row.blocks)
        self._last = row.time
        request = Request(len(self.jobs), row.prompt, row.blocks)
        self.jobs.append(Job(request, row.output, (row.time - self._start) / self._loader.per_second))

    def _chain(self, blocks: tuple[int, ...]) -> None:
        """Learn what each id follows. Raises StropError where it followed another one before."""
        before = (-1, *blocks)[: len(blocks)]
        if tuple(map(self._before.get, blocks, before)) != before or len(set(blocks)) != len(blocks):
            raise StropError("hash_ids has an id after another one than before, so they are not chained")
        self._before.update(zip(blocks, before, strict=True))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers. Raises StropError where the file cannot be read."""
    try:
        require_file(path, "trace", MAX_BYTES)
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line := line.strip():
                    yield number, line
    except (OSError, ValueError) as error:
        raise StropError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _text(line: bytes) -> str:
    if b"\0" in line:
        raise StropError("it holds a NUL byte, so the file is not text")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise StropError(f"it is not UTF-8 text (byte {error.start})") from error


def _loader(first: str) -> tuple[Loader, bool]:
    """The loader that a first line asks for, and whether that line is a row."""
    if first.startswith("{"):
        return Mooncake(), True
    header = split(first)
    for loader in (Azure, BurstGPT):
        if set(loader.columns) <= set(header):
            return loader(header), False
    raise StropError(
        "this starts no trace that is known: give JSON Lines of Mooncake, or CSV whose header has "
        f"{', '.join(Azure.columns)} (Azure) or {', '.join(BurstGPT.columns)} (BurstGPT)"
    )
