"""Files that are whole or absent: what a killed writer left is swept away, a living one's is not."""

import errno
import fcntl
import os
import shutil
import signal
import sqlite3
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from strop.core.errors import StropError
from strop.core.files import atomic, require_folder, scratch, sweep
from strop.core.store import ResultStore


def write(temporary: Path, text: str) -> None:
    """Write a file, or one in a folder."""
    (temporary / "x" if temporary.is_dir() else temporary).write_text(text)


def abandoned(path: Path, way) -> Path:
    """What `way` has begun of `path` when its process is killed, with what a library put beside it."""
    child = os.fork()
    if child == 0:
        with way(path) as temporary:
            write(temporary, "half")
            (temporary.parent if way is atomic else temporary).joinpath(".tmpQ8x").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = path.parent.glob(f".{path.name}.*")
    return left


@pytest.mark.parametrize("way", [atomic, scratch])
def test_what_a_killed_run_left_is_swept(way, tmp_path):
    path = tmp_path / "name.json"
    left = abandoned(path, way)
    assert left.exists() and not path.exists()
    with way(path) as temporary:
        assert not left.exists()
        write(temporary, "whole")
    assert {found.name for found in tmp_path.iterdir()} <= {"name.json"}


def test_what_was_left_of_a_whole_file_can_be_swept(tmp_path):
    path = tmp_path / "name.json"
    path.write_text("whole")
    left = abandoned(path, atomic)
    sweep(path)
    assert not left.exists() and path.read_text() == "whole"


@pytest.mark.parametrize("way", [atomic, scratch])
def test_what_a_living_run_has_is_left_alone(way, tmp_path):
    path = tmp_path / "name.json"
    with way(path) as first:
        write(first, "one")
        with way(path) as second:
            write(second, "two")
            assert first != second and first.exists()


def test_other_files_of_like_names_stay(tmp_path):
    names = [
        ".name.json.original",
        ".name.json.part",
        "name.json.x.part",
        ".name.jsonx.y.part",
        ".name.json.mine.part",
        ".name.json.0123abcd.abcdefgh.part",
        ".other.x.part",
    ]
    for name in names:
        (tmp_path / name).write_text("mine")
    with atomic(tmp_path / "name.json") as temporary:
        temporary.write_text("{}")
    assert {path.name for path in tmp_path.iterdir()} == {*names, "name.json"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_a_failure_leaves_the_old_file_and_says_why(error, tmp_path):
    path = tmp_path / "name"
    path.write_text("old")
    with pytest.raises(StropError, match=r"cannot write .*name: No space left"), atomic(path):
        raise error
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_what_is_no_file_is_not_replaced(tmp_path):
    """As root a rename would put a file in the place of a device such as /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(StropError, match="a folder or a device"), atomic(tmp_path / name):
            pass
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "folder").is_dir()


def test_asking_for_a_folder_leaves_nothing(tmp_path):
    require_folder(tmp_path / "a" / "b")
    assert not [*tmp_path.iterdir()]


def test_a_file_system_without_locks_is_written_to_and_not_swept(tmp_path, monkeypatch):
    path = tmp_path / "name.json"
    left = abandoned(path, atomic)

    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with atomic(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert {found.name for found in tmp_path.iterdir()} == {"name.json", left.name}


def test_a_rival_that_sweeps_too_early_is_outlived(tmp_path, monkeypatch):
    made = []

    def drawn(*told) -> str:
        made.append(real(*told))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    real = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", drawn)
    with atomic(tmp_path / "name") as temporary:
        temporary.write_text("whole")
    assert len(made) == 2 and [*tmp_path.iterdir()] == [tmp_path / "name"]


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_an_error_of_sqlite_is_told_as_a_full_disk_only_where_it_is_one(tmp_path, monkeypatch, free):
    def refuse(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    store = ResultStore(tmp_path / "results.sqlite")
    monkeypatch.setattr(store, "connection", SimpleNamespace(execute=refuse))
    told = "disk I/O error" if free else "the disk is full"
    with pytest.raises(StropError, match=f"cannot read .*: {told}"):
        store.get("key")
    monkeypatch.setattr(sqlite3, "connect", refuse)
    with pytest.raises(StropError, match=rf"cannot keep results in .* \({told}\): name another folder"):
        ResultStore(tmp_path / "other.sqlite")
