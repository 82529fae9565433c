"""The bundled spiking transformers: what their cards say, and the script that trains them."""

import importlib
import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from strop.cli import app
from strop.models.spiking_saved import from_folder
from strop.models.zoo import card, zoo_names, zoo_path, zoo_root
from strop.tasks.digits import Labelled, accuracy, digits, recordings

KINDS = {"svit-digits": (0.97, 162_426), "svit-events": (0.80, 41_738)}
NAMES = [name + twin for name in KINDS for twin in ("", "-1")]
FILES = {"card.md", "config.json", "metrics.json", "model.safetensors", "training.json"}
MOST_BYTES = 2_000_000
pytest.importorskip("sklearn")


@pytest.fixture
def script(monkeypatch):
    """The training script, which lives beside the models and not in the package."""
    monkeypatch.syspath_prepend(str(zoo_root()))
    return importlib.import_module("train_svit")


@pytest.fixture
def few(script, monkeypatch):
    """The script with 64 images a part, each recorded once."""
    shared = importlib.import_module("svit")

    def some(part, *camera):
        whole = digits(part) if not camera else recordings(part, camera[0], 1)
        return Labelled(whole.images[:64], whole.labels[:64])

    monkeypatch.setattr(shared, "digits", some)
    monkeypatch.setattr(shared, "recordings", lambda part, camera, times, seed: some(part, camera))
    monkeypatch.setattr(shared, "TIMES", 1)
    return script


def options(script, monkeypatch, out, *more):
    words = ["train", "--out", str(out), "--threads", "1", "--width", "16", "--passes", "1", *more]
    monkeypatch.setattr(sys, "argv", words)
    return script.parse()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_does_what_its_folder_says(script, name, monkeypatch, tmp_path):
    kind, folder = name.removesuffix("-1"), zoo_path(name)
    least, parameters = KINDS[kind]
    assert {file.name for file in folder.iterdir()} == FILES
    assert sum(file.stat().st_size for file in folder.iterdir()) < MOST_BYTES
    model, told = from_folder(folder), json.loads((folder / "metrics.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == parameters
    args = options(script, monkeypatch, tmp_path, *([] if kind == "svit-digits" else ["--events"]))
    found = accuracy(model, script.chosen(args).held_out("test"))
    assert found == pytest.approx(told["test"]["share"], abs=0.01)
    for row in told.values():
        assert row["low"] <= row["share"] <= row["high"] and row["count"] >= 300
    assert min(told["plan"]["share"], told["test"]["share"]) >= least
    assert kind == "svit-digits" or told["test, blocks skipped"]["high"] < least  # there is something to cut


@pytest.mark.parametrize("name", NAMES)
def test_cards_say_what_they_must(name):
    text, record = card(name), json.loads((zoo_path(name) / "training.json").read_text())
    assert text.startswith(f"# {name}\n")
    for needed in ("Architecture", "Data", "seed", "icence", "minutes on", "not for", record["device"]):
        assert needed in text, needed
    assert record["plan"]["seed"] == int(name.endswith("-1"))
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", KINDS)
def test_twins_differ(name):
    one, two = (load_file(zoo_path(n) / "model.safetensors") for n in (name, f"{name}-1"))
    assert one.keys() == two.keys() and not torch.equal(one["head.weight"], two["head.weight"])


def test_the_command_line_lists_them_and_says_what_they_are_not():
    listed = CliRunner().invoke(app, ["zoo", "list", "--json"]).stdout
    rows = {row["name"]: row["about"] for row in json.loads(listed)}
    assert set(NAMES) <= set(zoo_names()) and set(NAMES) <= rows.keys()
    assert "spiking transformer" in rows["svit-digits"] and "twin" in rows["svit-digits-1"]
    for verb in (["tune"], ["generate", "--prompt", "x"], ["quantize", "--method", "rtn", "-o", "unused"]):
        said = CliRunner().invoke(app, [*verb, "zoo:svit-digits"])
        assert said.exit_code == 2 and isinstance(said.exception, SystemExit), said.output
        assert "'SpikingTransformer', not a causal language model" in " ".join(said.output.split())


def test_a_killed_training_resumes_exactly(few, monkeypatch, tmp_path):
    kind = few.chosen(options(few, monkeypatch, tmp_path, "--events"))
    kind = replace(kind, plan=replace(kind.plan, passes=2, batch=16))

    def run(out, kind=kind):
        return few.Run(kind, tmp_path / out, "cpu", checkpoint_every=2)

    whole = run("whole")
    whole.train()
    run("parts").train(until=5)
    resumed = run("parts")
    assert resumed.step == 5
    resumed.train()
    another = run("another", replace(kind, plan=replace(kind.plan, seed=1)))
    another.train()
    states = [r.model.state_dict() for r in (whole, resumed, another)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])
    assert whole.log[-1]["step"] == whole.steps == 8


@pytest.mark.parametrize("seen", ([], ["--cluttered"]))
def test_a_finished_folder_is_measured_again_and_not_trained(few, monkeypatch, tmp_path, seen):
    out = tmp_path / "model"
    monkeypatch.setattr(few, "chosen", lambda args, chosen=few.chosen: small_batches(chosen(args)))
    options(few, monkeypatch, out, *seen)
    few.main()
    weights, metrics = (out / "model.safetensors").read_bytes(), (out / "metrics.json").read_text()
    assert {file.name for file in out.iterdir()} == FILES
    (out / "metrics.json").unlink()
    few.main()
    assert (out / "model.safetensors").read_bytes() == weights
    assert (out / "metrics.json").read_text() == metrics


def small_batches(kind):
    return replace(kind, plan=replace(kind.plan, batch=32))
