"""Files that are whole or absent: what a killed writer left is swept away, a living one's is not."""

import os
import signal
from pathlib import Path

import pytest
from safetensors import SafetensorError

from strop.core.errors import StropError
from strop.core.files import atomic, require_folder, scratch


def abandoned(path: Path, way) -> Path:
    """What `way` has begun of `path` when its process is killed."""
    child = os.fork()
    if child == 0:
        with way(path) as temporary:
            (temporary / "x" if temporary.is_dir() else temporary).write_text("half")
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
        assert not left.exists() and temporary.exists()
    assert {found.name for found in tmp_path.iterdir()} <= {"name.json"}


@pytest.mark.parametrize("way", [atomic, scratch])
def test_what_a_living_run_has_is_left_alone(way, tmp_path):
    path = tmp_path / "name.json"
    with way(path) as first, way(path) as second:
        assert first != second and first.exists() and second.exists()


def test_other_files_of_like_names_stay(tmp_path):
    names = [
        ".name.json.original",
        ".name.json.part",
        "name.json.x.part",
        ".name.jsonx.y.part",
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
