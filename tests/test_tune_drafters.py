"""Drafters in a study: which are tried, what is measured of them, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from test_cli import save_tiny
from test_tune import model, rows_of, small, text  # noqa: F401 - fixtures

from strop.core.errors import StropError
from strop.decode import CaDDTree, DDTree
from strop.decode.checkpoint import new_config, save_drafter
from strop.decode.dflash import DFlashNet
from strop.decode.load import drafters_for
from strop.kv import KVarN
from strop.model import load
from strop.recipe import Recipe, candidates, named
from strop.tune import workload
from strop.tune.engine import Settings, tune


def save_noise(folder: Path, target: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    net = DFlashNet(new_config(load(str(target)).plain, 1, 4, mask_token_id=0, taps=[0, 1]))
    save_drafter(folder, net)
    return folder


@pytest.fixture(autouse=True)
def zoo(tmp_path, monkeypatch, model) -> Path:  # noqa: F811
    """Bundled models: one drafter for the model that is studied, and one for another."""
    root = tmp_path / "zoo"
    save_noise(root / "mine", model)
    other = save_tiny(tmp_path / "other")
    save_noise(root / "theirs", other)
    monkeypatch.setenv("STROP_ZOO", str(root))
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    return root


def test_candidates_are_the_drafters_made_for_the_model(model, zoo, monkeypatch):  # noqa: F811
    assert drafters_for(load(str(model)).plain) == ["zoo:mine"]
    tried = candidates(64, ["zoo:mine"])
    assert tried["decode"][-1] == CaDDTree(drafter="zoo:mine")
    assert tried["kv"] == candidates(64)["kv"]
    assert Recipe(decode=tried["decode"][-1]).label() == "caddtree mine"
    assert Recipe(decode=CaDDTree(drafter="/some/where/mine", price="global")).label() == (
        "caddtree mine price=global"
    )
    assert named("decode", "ddtree", ["zoo:mine"]) == [DDTree(drafter="ngram"), DDTree(drafter="zoo:mine")]
    monkeypatch.setenv("STROP_ZOO", str(zoo / "nowhere"))
    assert drafters_for(load(str(model)).plain) == []


def test_drafters_are_measured_with_what_they_hold(model, text, tmp_path, zoo):  # noqa: F811
    given = shutil.copytree(zoo / "mine", tmp_path / "given")
    settings = Settings(methods=("kvarn", "caddtree"), draft=str(given), max_drop=0.99)
    study = tune(str(model), text, tmp_path / "out", settings)
    rows = rows_of(study)
    for name in ("ngram", "mine", "given"):
        row = rows[f"caddtree {name}"]
        assert row["status"] == "measured", row["reason"]
        assert row["quality"]["agreement"] == 1 and row["quality"]["kl"] == 0
        assert row["speed"]["kv_ratio"] is None and row["speed"]["step_ratio"][0] > 0
    assert rows["caddtree ngram"]["memory"]["ratio"] == 1
    memory = rows["caddtree mine"]["memory"]
    weights = sum(
        p.nbytes for p in DFlashNet(new_config(load(str(model)).plain, 1, 4, 0, [0, 1])).parameters()
    )
    assert memory["drafter_bytes"] == weights // 2 + 2 * 64 * 2 * memory["context"]
    assert memory["ratio"] > 1
    both = [row for label, row in rows.items() if "kvarn" in label and "caddtree" in label]
    assert both and all(row["status"] == "measured" for row in both), [row["reason"] for row in both]
    assert f"--draft {given}" in study["settings"]["command"]


def test_a_named_method_takes_every_drafter(model, text, tmp_path):  # noqa: F811
    study = tune(str(model), text, tmp_path / "out", Settings(methods=("dflash",)))
    assert {"dflash ngram", "dflash mine"} <= set(rows_of(study))


def test_a_drafter_that_does_not_load_is_refused_in_its_row(model, text, tmp_path, zoo):  # noqa: F811
    weights = zoo / "mine" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    settings = Settings(methods=("caddtree",), draft=str(tmp_path / "nowhere"))
    rows = rows_of(tune(str(model), text, tmp_path / "out", settings))
    assert rows["caddtree mine"]["status"] == "refused" and "damaged" in rows["caddtree mine"]["reason"]
    assert (
        rows["caddtree nowhere"]["status"] == "refused" and "no drafter" in rows["caddtree nowhere"]["reason"]
    )
    assert rows["caddtree ngram"]["status"] == "measured"


def test_a_drafter_trained_anew_is_measured_anew(model, text, tmp_path, zoo):  # noqa: F811
    settings = Settings(methods=("dflash",))
    tune(str(model), text, tmp_path / "out", settings)
    save_noise(zoo / "mine", model, seed=1)
    rows = rows_of(tune(str(model), text, tmp_path / "out", settings, resume=True))
    assert "reused" in rows["dflash ngram"] and "reused" not in rows["dflash mine"]


def test_a_drafter_that_nothing_would_try_is_refused():
    with pytest.raises(StropError, match="name caddtree in --methods as well"):
        Settings(methods=("kvarn",), draft="ngram")


def test_speed_is_measured_all_over_the_texts(model):  # noqa: F811
    texts = [tuple(range(0, 100)), tuple(range(100, 200))]
    batches = workload._speed_batches(texts, 30, 2)
    starts = [row[0] for batch in batches for row in batch]
    assert len(batches) == workload.PLACES and all(len(batch) == 2 for batch in batches)
    assert sorted(starts) == [number * 200 // 16 for number in range(16)]
    assert all(len(row) == 30 for batch in batches for row in batch)
    assert KVarN().max_rollback >= CaDDTree(drafter="ngram").least_rollback
