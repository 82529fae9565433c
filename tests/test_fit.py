"""Training a drafter in one command: what is held out, kept, resumed, and told."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_cli import ROOT, said, save_tiny, strop_

from strop.core import training
from strop.core.errors import StropError
from strop.core.files import scratch
from strop.decode import fit, load_drafter
from strop.decode.corpus import hold_out
from strop.decode.coverage import Coverage
from strop.model import load
from strop.tasks.python_source import held_out_text
from strop.tune.workload import training_texts

WORDS = "".join(f"def add_{n}(a, b):\n    return a + {n} * b\n\n" for n in range(60))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("target") / "model", num_hidden_layers=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))


def words(model: Path, text: Path, out: Path, *more: object) -> tuple:
    told = (
        "train",
        "drafter",
        "--target",
        model,
        "--data",
        text,
        "--out",
        out,
        "--tokens",
        600,
        "--block",
        4,
    )
    return (*told, "--steps", 4, *more)


def test_texts_are_held_out_by_what_they_say():
    documents = [list(range(n, n + 3000)) for n in range(0, 9000, 3000)]
    train, held_out = hold_out(documents)
    assert (train, held_out) == hold_out(documents[::-1])
    assert sorted(token for piece in (*train, *held_out) for token in piece) == list(range(9000))
    assert len(held_out) == round(len([*train, *held_out]) / 20) == 1
    twice, _ = hold_out([*documents, *documents])
    assert not set(twice) & set(hold_out([*documents, *documents])[1]), "a text was on both sides"
    with pytest.raises(StropError, match="has 50 tokens, too few"):
        hold_out([range(50)])


@pytest.mark.parametrize(
    ("mask", "pad", "end", "known", "found"),
    [
        (3, 2, 1, 9, 3),
        (None, 2, 1, 9, 2),
        (None, 1, 1, 9, 9),
        (None, None, 1, 10, 1),
        (None, None, None, 10, 9),
    ],
)
def test_the_mask_is_a_token_that_texts_hardly_have(mask, pad, end, known, found):
    class Tokenizer(SimpleNamespace):
        def __len__(self) -> int:
            return known

    tokenizer = Tokenizer(mask_token_id=mask, pad_token_id=pad, eos_token_id=end)
    assert fit.mask_token(tokenizer, 10)[0] == found


def test_drawing_weights_leaves_the_callers_chance_alone(model):
    config = fit.new_config(load(model, "fp32").plain, 2, 4, 0, [0, 1])
    for draw in (fit.new_net, fit.new_approximator):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        one = draw(config, seed=0).state_dict()
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(6)
        other, third = draw(config, seed=0).state_dict(), draw(config, seed=1).state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert any(not torch.equal(one[name], third[name]) for name in one)


def test_a_drafter_starts_as_the_targets_last_layers(model):
    target = load(model, "fp32").plain
    net = fit.new_net(fit.new_config(target, 2, 4, 0, [0, 1]), seed=0)
    fit.copy_layers(net, target)
    for own, copied in zip(net.layers, target.model.layers[-2:], strict=True):
        assert torch.equal(own.mlp.up_proj.weight, copied.mlp.up_proj.weight)
        assert torch.equal(own.self_attn.q_norm.weight, copied.self_attn.q_norm.weight)
    assert torch.equal(net.fc.weight[:, 32:], torch.eye(32))


def test_a_trained_drafter_drafts_for_its_target(model, text, tmp_path):
    out = tmp_path / "out"
    told = said(*words(model, text, out, "--treeflash"))
    assert told["run"]["mask_token_id"] == 0 and "end of text" in told["mask_token"]
    plain, corrected = (told["coverage"][name] for name in ("plain", "corrected"))
    assert set(plain) == set(corrected) == {"greedy", "sampled"}
    for found in (Coverage(**part[kind]) for part in (plain, corrected) for kind in plain):
        assert found.blocks > 0 and len(found.kl) == 3
    assert json.loads((out / "training.json").read_text())["rows"] == told["rows"]
    target = load(model)
    assert load_drafter(out, target.plain).rows == fit.CANDIDATES
    drafted = said("generate", model, "--prompt", "def ", "--draft", out, "--max-new-tokens", 24)
    assert drafted["text"] == said("generate", model, "--prompt", "def ", "--max-new-tokens", 24)["text"]
    assert (
        sum(drafted["speculation"]["accepted_by_depth"].values()) == drafted["speculation"]["spec_verify_ct"]
    )


def test_the_diagnosis_comes_before_the_approximator(model, text, tmp_path):
    told = strop_(*words(model, text, tmp_path / "out", "--treeflash"))
    assert "top 4" in told.stderr and "correction" not in told.stderr
    assert "before and after the correction" in told.stdout and "to 0." in told.stdout
    for line in ("Mask:    0, the tokenizer's end of text", f"Drafter: {tmp_path / 'out'}", "--draft"):
        assert line in told.stdout
    alone = strop_(*words(model, text, tmp_path / "alone"))
    assert "accepted" in alone.stdout and alone.stderr == ""


def test_a_killed_run_goes_on_to_the_same_drafter(model, text, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ("--tokens", 30_000, "--steps", 40, "--treeflash")
    strop_(*words(model, text, whole, *more))
    command = [sys.executable, "-m", "strop", *map(str, words(model, text, parts, *more))]
    run = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(parts.glob("work/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not (parts / "config.json").exists(), "the run was over before it was killed"
    strop_(*words(model, text, parts, *more))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (parts, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_killed_before_its_note_was_whole_begins_again(model, text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with scratch(out / "run.json") as folder:
        left = folder.name
    (out / left).mkdir()
    (out / left / "run.json").write_text('{"tar')
    strop_(*words(model, text, out))
    assert not [*out.glob(".*")] and (out / "config.json").exists()
    (out / "run.json").unlink()
    assert "holds files that no training run wrote" in strop_(*words(model, text, out), code=2).stderr


def test_another_run_keeps_the_stages_that_fit(model, text, tmp_path):
    out = tmp_path / "out"
    strop_(*words(model, text, out))
    before = {path.name: path.stat().st_mtime_ns for path in (out / "work").rglob("*.safetensors")}
    strop_(*words(model, text, out, "--treeflash", "--resume"))
    after = {path.name: path.stat().st_mtime_ns for path in (out / "work").rglob("*.safetensors")}
    assert sum(after.get(name) == when for name, when in before.items()) >= 2, "the rows were written again"
    assert len(list((out / "work").glob("dflashnet-*"))) == 1


def test_bundled_texts_to_train_on_are_not_those_that_are_held_out():
    coder = load("zoo:coder")
    texts = training_texts(coder, None)
    assert len(texts) > 100
    held_out = [coder.encode(text)[:200] for text in held_out_text(200_000)]
    assert not any(ids[:200] in held_out for ids in texts)


def test_minutes_that_are_left_follow_the_rate_so_far(monkeypatch):
    clock, heard = iter([0.0, 60.0, 120.0]), []
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    told = training.timed(lambda what, share: heard.append(what))
    for share in (0.5, 0.6, 0.7):
        told("training", share)
    assert heard == ["training", "training, 4.0 minutes left", "training, 3.0 minutes left"]
