"""The scripts of the bundled drafters: trained once, measured again on request, and nothing left over."""

import importlib
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from strop.decode.checkpoint import read_drafter
from strop.decode.corpus import Shape
from strop.decode.training import Plan
from strop.models.zoo import zoo_root
from strop.tasks.python_source import held_out_text

NAMES = ("dflash", "treeflash")


@pytest.fixture
def scripts(monkeypatch) -> dict[str, ModuleType]:
    """Both, made small; the modules they share are `drafters`."""
    monkeypatch.syspath_prepend(str(zoo_root()))
    texts = dict(enumerate(held_out_text()[:3]))
    shared = importlib.import_module("drafters")
    for name, value in {
        "python_source": SimpleNamespace(texts=lambda split, stdlib: texts),
        "ROWS": 16,
        "WIDTH": 64,
        "MEASURED": Shape(rows=4, width=64, batch=2),
        "BLOCKS": 3,
    }.items():
        monkeypatch.setattr(shared, name, value)
    found = {"drafters": shared}
    for name in NAMES:
        found[name] = importlib.import_module(f"train_coder_{name}")
        monkeypatch.setattr(found[name], "PLAN", Plan(steps=2, batch=2, anchors=4))
    return found


def test_a_finished_folder_is_measured_again_and_not_trained(scripts, tmp_path, monkeypatch):
    def run(name: str) -> None:
        out = tmp_path / f"coder-{name}"
        monkeypatch.setattr(sys, "argv", ["train", "--out", str(out), "--threads", "1"])
        scripts[name].main()

    for name in NAMES:
        run(name)
    model, _ = scripts["drafters"].target(SimpleNamespace(device="cpu"))
    for name in NAMES:
        out = tmp_path / f"coder-{name}"
        files = {"card.md", "config.json", "metrics.json", "model.safetensors", "training.json"}
        assert {file.name for file in out.iterdir()} == files
        read_drafter(out, model)
        told = json.loads((out / "metrics.json").read_text())
        assert (told["rows"], told["width"], told["blocks"]) == (4, 64, 3)
        assert set(told["texts"]) == {"greedy", "sampled"}
        card = (out / "card.md").read_text()
        assert "On 4 held-out rows of 64 tokens that the coder continued,\n3 blocks drawn" in card
        weights = load_file(out / "model.safetensors")
        (out / "metrics.json").unlink()
        monkeypatch.setattr(scripts["drafters"], "Trainer", None)
        run(name)
        assert json.loads((out / "metrics.json").read_text()) == told
        again = load_file(out / "model.safetensors")
        assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_an_interrupted_run_leaves_no_weights_where_drafters_are_read(scripts, tmp_path, monkeypatch):
    shared, out = scripts["drafters"], tmp_path / "coder-dflash"

    def killed(*told) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shared, "save_drafter", killed)
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(out), "--threads", "1"])
    with pytest.raises(KeyboardInterrupt):
        scripts["dflash"].main()
    assert not list(out.glob("*.safetensors")) and list(out.glob("work/*.safetensors"))
