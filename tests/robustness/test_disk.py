"""A disk that fills up on the way: one sentence, nothing torn, and the run goes on once there is space."""

import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from counts import count, draws

from robustness.jobs import goes_on, require_whole

PAGE = 4096


def mount(place: Path, size: int, *options: str) -> None:
    told = ",".join([*options, f"size={size}"])
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", told, "tmpfs", place], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk takes the right to mount one: {done.stderr.strip()}")


@contextmanager
def disk(place: Path, size: int):
    """A disk of so many bytes."""
    place.mkdir()
    mount(place, size)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def used(folder: Path) -> int:
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["rtn", "gptq", "alphaq", "tune", "train"])
def test_a_run_goes_on_once_there_is_space(warm, undisturbed, name, tmp_path):
    known, chance, times = undisturbed(name), draws(f"disk {name}"), count(1, 8)
    full = used(known.whole.parent)
    for index in range(times):
        size = PAGE * max(int(full / PAGE * (index + chance.random()) / times), 2)
        with disk(tmp_path / str(index), size) as place:
            run = warm.run(*known.job.line(place / "out"))
            assert run.in_one_sentence(), f"{size} bytes of {full}: {run}"
            assert "No space left" in run.stderr or "full" in run.stderr, run.stderr
            require_whole(place)
            mount(place, 4 * full + (8 << 20), "remount")
            goes_on(warm, known, place / "out")


def test_generate_needs_no_space(warm, model, tmp_path):
    with disk(tmp_path / "disk", PAGE) as place:
        (place / "filled").write_bytes(bytes(PAGE - 1))
        run = warm.run("generate", model, "--prompt", "x", cwd=str(place), environ={"TMPDIR": str(place)})
        assert run.code == 0, run
