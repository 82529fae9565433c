"""Quantizing layer by layer: memory stays that of a layer, and a killed run goes on to the same bytes."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantizing import build, rows, save

from strop.core.checkpoint import inspect
from strop.core.errors import StropError
from strop.recipe import Recipe
from strop.weights import GPTQ, RTN, AlphaQ, WeightMethod
from strop.weights import draft as drafts
from strop.weights.draft import Draft
from strop.weights.stream import quantize_checkpoint

METHODS = {
    "rtn": RTN(bits=4, group=32),
    "own form": RTN(bits=1, group=32),
    "gptq": GPTQ(bits=4, group=32, symmetric=False),
    "alphaq by gptq": AlphaQ(bits=2.5, quantizer=GPTQ(bits=4, group=32), gamma=5.0),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)

MEASURED = """
import os, sys
from pathlib import Path
import torch
from strop.core.checkpoint import inspect
from strop.recipe import Recipe
from strop.weights import RTN
from strop.weights.stored import Stored
from strop.weights.stream import quantize_checkpoint

torch.set_num_threads(1)

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

def run(name, out):
    folder, method = Path(sys.argv[1], name), RTN(bits=8)
    recipe = Recipe(model=str(folder), weights=method).to_yaml()
    quantize_checkpoint(inspect(folder), method, Path(sys.argv[1], out), recipe)

def peak(out):
    # Bytes that quantizing takes at most on top of what is held before, mapped files included.
    sys.stdout.flush()
    if os.fork() == 0:
        run("small", f"{out}-small")  # libraries are in memory from here on
        Path("/proc/self/clear_refs").write_text("5")
        before = kilobytes("VmRSS")
        run("large", out)
        print(out, 1024 * (kilobytes("VmHWM") - before), flush=True)
        os._exit(0)
    os.wait()

peak("streamed")
Stored.release = lambda self, module: None
peak("kept")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Three layers of experts in several shards."""
    model = build("qwen2_moe", torch.bfloat16, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    folder = save(model, tmp_path_factory.mktemp("source") / "model", "200KB")
    assert len([*folder.glob("*.safetensors")]) > 2
    return folder


def quantize(source: Path, method: WeightMethod, out: Path, resume: bool = False):
    recipe = Recipe(model=str(source), weights=method).to_yaml()
    return quantize_checkpoint(inspect(source), method, out, recipe, rows, resume)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed(work, at: str, count: int = 2) -> None:
    """Run `work` in a process that kills itself, as kill -9 does, at call `count` of a step of drafts."""
    child = os.fork()
    if child == 0:
        done, step = [], getattr(drafts, at, None) or getattr(Draft, at)

        def last(*args, **named):
            done.append(None)
            if len(done) == count and at == "save_file":
                Path(args[1]).write_bytes(b"half a shard")
            elif len(done) <= count:
                step(*args, **named)
            if len(done) == count:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(drafts if hasattr(drafts, at) else Draft, at, last)
        try:
            work()
        finally:
            os._exit(7)
    assert os.WIFSIGNALED(status := os.waitpid(child, 0)[1]) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.fixture
def shards(monkeypatch) -> list[str]:
    """The layers that are stored from now on."""
    seen: list[str] = []
    step = Draft.add

    def add(self, unit, *args):
        seen.append(unit)
        step(self, unit, *args)

    monkeypatch.setattr(Draft, "add", add)
    return seen


LAYERS = [f"model.layers.{index}" for index in range(3)] + ["rest 0"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_memory_is_that_of_a_layer(tmp_path):
    """What streaming takes at most is little beside the model; where packed layers stay in memory, as in the
    control, it is more."""
    save(build("llama", torch.bfloat16), tmp_path / "small")
    size = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 48}
    large = save(build("llama", torch.bfloat16, **size), tmp_path / "large", "10MB")
    places = (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    told = {line.split()[0]: int(line.split()[1]) for line in run.stdout.splitlines()}
    checkpoint = inspect(large)
    assert len(checkpoint.shards) > 8 and (tmp_path / "streamed" / "config.json").exists()
    assert told["streamed"] < 0.4 * checkpoint.bytes < told["kept"], (told, checkpoint.bytes)


@every_method
@pytest.mark.parametrize("at", ["add", "save_file", "_write"])
def test_a_killed_run_goes_on_to_the_same_bytes(method, at, source, tmp_path, shards):
    quantize(source, method, tmp_path / "whole")
    out = tmp_path / "out"
    killed(lambda: quantize(source, method, out), at, 4 if at == "_write" else 2)
    assert not out.exists() and (tmp_path / ".out.draft").is_dir()
    shards.clear()
    quantize(source, method, out, resume=True)
    assert shards == (LAYERS[1:] if at == "save_file" else LAYERS[2:])
    assert contents(out) == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_without_resume_a_draft_is_begun_anew(source, tmp_path, shards):
    method, out = METHODS["rtn"], tmp_path / "out"
    killed(lambda: quantize(source, method, out), "save_file")
    shards.clear()
    quantize(source, method, out)
    assert shards == LAYERS
    quantize(source, method, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_resume_takes_nothing_from_other_settings_or_shards(source, tmp_path, shards):
    out = tmp_path / "out"
    killed(lambda: quantize(source, RTN(bits=8), out), "add")
    shards.clear()
    quantize(source, METHODS["rtn"], out, resume=True)
    assert shards == LAYERS
    quantize(source, METHODS["rtn"], tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")

    copy = save(build("llama", torch.bfloat16), tmp_path / "model")
    killed(lambda: quantize(copy, METHODS["rtn"], tmp_path / "changed"), "add", 1)
    save(build("llama", torch.bfloat16, initializer_range=0.2), copy)
    shards.clear()
    quantize(copy, METHODS["rtn"], tmp_path / "changed", resume=True)
    assert shards == ["model.layers.0", "model.layers.1", "rest 0"]


def test_resume_survives_notes_that_are_broken_or_absent(source, tmp_path, shards):
    method = METHODS["rtn"]
    quantize(source, method, tmp_path / "whole")
    for index, notes in enumerate([None, "{", "[]", "{}", '"key"', '{"key": 1, "plan": 3}']):
        out = tmp_path / f"out{index}"
        if notes is not None:
            killed(lambda: quantize(source, method, out), "add")  # noqa: B023
            (tmp_path / f".out{index}.draft" / "draft.json").write_text(notes)
        shards.clear()
        quantize(source, method, out, resume=True)
        assert shards == LAYERS
        assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("at", ["made", "noting", "moving"])
def test_a_run_killed_before_its_notes_or_after_them_goes_on(at, source, tmp_path):
    """Its folder is empty, or has notes that are not whole, or all but the notes."""
    method, out, real = METHODS["rtn"], tmp_path / "out", os.replace
    quantize(source, method, tmp_path / "whole")

    def dies(*args: object) -> None:
        if at != "moving" or Path(str(args[0])).is_dir():
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)

    child = os.fork()
    if child == 0:
        setattr(*((Draft, "_fresh") if at == "made" else (os, "replace")), dies)
        quantize(source, method, out)
        os._exit(7)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]) and not out.exists()
    draft = tmp_path / ".out.draft"
    assert not (draft / "draft.json").exists() and (len([*draft.iterdir()]) > 3) == (at == "moving")
    quantize(source, method, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_two_runs_at_once_are_refused(source, tmp_path):
    out = tmp_path / "out"
    with Draft(out, "key", resume=False), pytest.raises(StropError, match=r"another run is writing .*out"):
        quantize(source, METHODS["rtn"], out)
    assert not out.exists()
    quantize(source, METHODS["rtn"], out)
    assert out.is_dir()


@pytest.mark.parametrize("step", ["save_file", "replace"])
def test_a_full_disk_leaves_no_folder_and_a_draft_to_go_on_from(step, source, tmp_path, monkeypatch):
    out, method = tmp_path / "out", METHODS["rtn"]
    calls = []

    def full(*args, **named):
        calls.append(None)
        if len(calls) > 1 or step == "replace":
            Path(args[1]).write_bytes(b"half") if step == "save_file" else None
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **named)

    target = drafts if step == "save_file" else drafts.os
    real = getattr(target, step)
    with monkeypatch.context() as patched:
        patched.setattr(target, step, full)
        with pytest.raises((StropError, OSError), match="No space left"):
            quantize(source, method, out)
    assert not out.exists()
    quantize(source, method, out, resume=True)
    quantize(source, method, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_what_is_no_draft_is_left_alone(source, tmp_path):
    others, out = tmp_path / "others", tmp_path / "out"
    others.mkdir()
    (others / "precious").write_text("mine")
    (tmp_path / ".out.draft").symlink_to(others)
    for resume in (False, True):
        with pytest.raises(StropError, match=r"\.out\.draft is in the way"):
            quantize(source, METHODS["rtn"], out, resume=resume)
    assert (others / "precious").read_text() == "mine" and not out.exists()
    (tmp_path / "link").symlink_to(others)
    with pytest.raises(StropError, match="cannot be replaced"):
        quantize(source, METHODS["rtn"], tmp_path / "link")
    assert [path.name for path in others.iterdir()] == ["precious"]


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_shard_is_written_again(damage, source, tmp_path, shards):
    method, out = METHODS["rtn"], tmp_path / "out"
    quantize(source, method, tmp_path / "whole")
    killed(lambda: quantize(source, method, out), "add", 3)
    first = tmp_path / ".out.draft" / "model-00001.safetensors"
    first.write_bytes(first.read_bytes()[:100]) if damage == "cut" else first.unlink()
    shards.clear()
    quantize(source, method, out, resume=True)
    assert shards == LAYERS and contents(out) == contents(tmp_path / "whole")


def test_a_failed_move_keeps_the_draft(source, tmp_path, monkeypatch):
    out, real = tmp_path / "out", drafts.os.replace

    def busy(old, new):
        if Path(new) == out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return real(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(drafts.os, "replace", busy)
        with pytest.raises(OSError, match="busy"):
            quantize(source, METHODS["rtn"], out)
    quantize(source, METHODS["rtn"], out, resume=True)
    assert not [*tmp_path.glob(".*")] and not (out / "draft.json").exists()


def test_a_refusal_leaves_nothing(source, tmp_path):
    for method in (RTN(bits=4, group=48), AlphaQ(bits=2.5, quantizer=RTN(bits=4, group=128))):
        with pytest.raises(StropError, match="input channels"):
            quantize(source, method, tmp_path / "deep" / "out")
        assert not [*(tmp_path / "deep").iterdir()]


def test_the_place_must_be_free(source, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    quantize(source, METHODS["rtn"], taken)  # an empty folder is taken
    kept = contents(taken)
    for out in (taken, taken / "config.json"):
        with pytest.raises(StropError, match="exists already"):
            quantize(source, METHODS["rtn"], out)
    for out in (source, source / "inside"):
        with pytest.raises(StropError, match="own folder"):
            quantize(source, METHODS["rtn"], out)
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(StropError, match="own folder"):
        quantize(source, METHODS["rtn"], link / "inside")
    assert contents(taken) == kept and not (source / "inside").exists()


def test_the_index_names_every_tensor(source, tmp_path):
    done = quantize(source, METHODS["rtn"], tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = inspect(tmp_path / "out").shards
    assert len(shards) == 4 and {shard.name for shard in shards} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == done.bytes
