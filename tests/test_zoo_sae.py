"""The bundled sparse autoencoders: what their cards say, and the scripts that train them."""

import importlib
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

import strop
from strop.audit.sae import SAE
from strop.audit.sae_training import Settings, judged
from strop.audit.states import sequences
from strop.models.zoo import zoo_root
from strop.tasks.python_source import held_out_text

MOST_BYTES = 8_000_000


@pytest.mark.parametrize("name", ["coder", "moe", "moe-1"])
def test_an_autoencoder_reads_its_model_as_its_record_says(name):
    folder = zoo_root() / f"{name}-sae"
    assert sum(file.stat().st_size for file in folder.iterdir()) < MOST_BYTES
    sae, lm = SAE.load(folder), strop.load(f"zoo:{name}", "fp32")
    assert sae.m == 16 * lm.model.config.hidden_size
    assert sae.about["model_name"] == f"zoo:{name}"
    told = json.loads((folder / "metrics.json").read_text())
    rows = sequences([lm.encode(text) for text in held_out_text(60_000)], 256)[:24]
    found = judged(lm, sae, rows)
    assert found["fires_per_token"] == sae.k
    assert found["loss_recovered"] > 0.95
    assert found["explained_variance"] == pytest.approx(told["explained_variance"], abs=0.05)


def test_a_finished_folder_is_measured_again_and_not_trained(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(zoo_root()))
    shared = importlib.import_module("autoencoders")
    script = importlib.import_module("train_moe_sae")
    texts = dict(enumerate(held_out_text(20_000)))
    monkeypatch.setattr(shared, "python_source", SimpleNamespace(texts=lambda split, stdlib: texts))
    monkeypatch.setattr(shared, "WIDTH", 64)
    monkeypatch.setattr(shared, "HELD_OUT", 4)
    small = {"m": 64, "k": 4, "tokens": 2048, "batch": 512, "idle": 512}
    monkeypatch.setattr(script, "Settings", lambda **told: replace(Settings(**told), **small))
    out = tmp_path / "moe-1-sae"
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(out), "--threads", "1", "--seed", "1"])
    script.main()
    assert {file.name for file in out.iterdir()} == {
        "card.md",
        "cfg.json",
        "metrics.json",
        "sae_weights.safetensors",
        "training.json",
    }
    weights, card = (out / "sae_weights.safetensors").read_bytes(), (out / "card.md").read_text()
    assert "bundled `moe-1`: 64 features" in card
    (out / "metrics.json").unlink()
    script.main()
    assert (out / "sae_weights.safetensors").read_bytes() == weights
    assert json.loads((out / "metrics.json").read_text())["tokens"] == 256
