"""What `strop audit` finds out before it trains anything, and how it copes with odd features and controls."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from test_audit_verb import TEXT, audit, laid, told_by
from test_cli import save_tiny, strop_
from transformers.cache_utils import DynamicCache

from strop.audit import states, survival
from strop.audit.quality import pseudo_decode
from strop.audit.sae import SAE
from strop.auditing import beside

CACHED = "kv: {kvarn: {bits_k: 2, bits_v: 2, sinks: 0, tail: 32, group: 32}}\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return laid(tmp_path_factory.mktemp("checked"))


def refused_untrained(place: Path, out: Path, before: Path, after: Path, *words: object) -> str:
    """What is said, by a command that must neither train nor write anything."""
    given = ["--data", place / "text.txt", "--out", out, *words]
    output = told_by(strop_("audit", before, after, *given, code=2))
    assert not out.exists() and "is trained into" not in output
    return output


@pytest.fixture(scope="module")
def led(tmp_path_factory) -> Path:
    """A tiny model whose tokenizer has a first token."""
    at = save_tiny(tmp_path_factory.mktemp("led") / "model", initializer_range=0.3, bos_token_id=0)
    path = at / "tokenizer_config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"bos_token": told["eos_token"]}))
    return at


def test_the_first_token_is_judged_before_anything_is_trained(place, led, tmp_path, monkeypatch):
    recipe = place / "harsh.yaml"
    assert "use a --length of 3" in refused_untrained(place, tmp_path / "out", led, recipe, "--length", 2)
    monkeypatch.setattr(survival, "GATE", -100)
    output = refused_untrained(place, tmp_path / "out", led, recipe)
    assert "read this way it is not the model that is used" in output


def test_a_first_token_counts_nowhere_and_its_gate_is_printed(place, led, tmp_path):
    words = ["--data", place / "text.txt", "--sae", place / "sae", "--tokens", 3000, "--out", tmp_path]
    output = told_by(strop_("audit", led, place / "harsh.yaml", *words))
    told = json.loads((tmp_path / "audit.json").read_text())
    losses = f"{told['gate']['with_start']:.2f} nats a token with a first token and"
    assert f"First-token gate: passed, the model loses {losses}" in output
    assert told["regime"]["tokens"] == told["regime"]["sequences"] * (told["regime"]["length"] - 1)
    assert f"passed, the model loses {losses}" in (tmp_path / "report.html").read_text()


def test_another_reading_of_the_text_is_refused_before_anything_is_trained(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "lower")
    path = tmp_path / "lower" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    (tmp_path / "text.txt").write_text(TEXT.title())
    words = ("--data", tmp_path / "text.txt")
    output = refused_untrained(place, tmp_path / "out", place / "model", tmp_path / "lower", *words)
    assert "reads the text as other tokens" in output


def test_too_little_text_to_learn_from_is_refused_before_a_folder_is_claimed(place, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT[:1200])
    words = ("--data", tmp_path / "text.txt")
    output = refused_untrained(place, tmp_path / "out", place / "model", place / "harsh.yaml", *words)
    assert "less than one step of 2048" in output


def changed_sae(place: Path, at: Path, **changes: Any) -> SAE:
    sae = dataclasses.replace(SAE.load(place / "sae"), **changes)
    sae.w_enc[:, 3], sae.b_enc[3] = 0, 50
    sae.save(at)
    return sae


def test_a_feature_that_is_the_same_at_every_token_is_counted_and_left_out(place, tmp_path):
    changed_sae(place, tmp_path / "sae", form="relu", k=0)
    audit(place, tmp_path / "out", "harsh.yaml", "--sae", tmp_path / "sae")
    told = json.loads((tmp_path / "out" / "audit.json").read_text(), parse_constant=pytest.fail)
    table = pyarrow.parquet.read_table(tmp_path / "out" / "features.parquet")
    rho = table["rho"].to_numpy()
    assert table["feature"].to_numpy()[np.isnan(rho)].tolist() == [3]
    assert told["features"]["constant"] == 1 and told["features"]["active"] == len(rho)
    assert sum(told["histogram"]["counts"]) == len(told["points"]["rho"]) == len(rho) - 1
    assert sum(group["features"] for group in told["deciles"]["rate"]) == len(rho) - 1
    assert "1 the same at every token, left out" in (tmp_path / "out" / "report.html").read_text()


def test_noise_is_read_through_the_cache_of_the_change(place, tmp_path):
    """Rounding to 8 bits costs next to nothing here: beside it or noise, the cache is all that is felt."""
    (tmp_path / "both.yaml").write_text(f"strop: 1\nweights: {{rtn: {{bits: 8}}}}\n{CACHED}")
    audit(place, tmp_path / "out", tmp_path / "both.yaml", "--controls", "--tokens", 3000)
    rows = json.loads((tmp_path / "out" / "audit.json").read_text())["discordance"]
    assert rows[-1]["name"] == beside.NOISE and abs(rows[0]["rise"][0]) > 0.01
    assert rows[-1]["rise"][0] == pytest.approx(rows[0]["rise"][0], rel=0.3)


def test_both_sides_of_a_cache_are_read_in_blocks(place, tmp_path, monkeypatch):
    """In float32, one pass and blocks differ by rounding: a cache that codes nothing shows none of it."""
    blocks = []
    monkeypatch.setattr(states, "pseudo_decode", lambda *given: blocks.append(given) or pseudo_decode(*given))
    (tmp_path / "whole.yaml").write_text(f"strop: 1\n{CACHED.replace('tail: 32', 'tail: 512')}")
    audit(place, tmp_path / "out", tmp_path / "whole.yaml", "--length", 256)
    told = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert told["survival"]["mean"][0] == pytest.approx(1, abs=1e-6)
    assert told["loss"]["rise"][0] == pytest.approx(0, abs=1e-6)
    caches = [type(cache) for _, _, cache in blocks]
    assert caches.count(DynamicCache) == len(caches) / 2 > 0
    assert any("lost nothing" in note for note in told["notes"])


def test_a_control_that_fires_nowhere_is_a_row_without_survivors(place, tmp_path, monkeypatch):
    silent = dataclasses.replace(SAE.load(place / "sae"), form="relu", k=0, b_enc=torch.full((128,), -1e9))
    monkeypatch.setattr(beside, "untrained", lambda sae, seed: silent)
    audit(place, tmp_path, "harsh.yaml", "--controls", "--tokens", 3000)
    told = json.loads((tmp_path / "audit.json").read_text(), parse_constant=pytest.fail)
    assert told["discordance"][2] == told["discordance"][2] | {"survived": [None] * 3, "rate": None}
