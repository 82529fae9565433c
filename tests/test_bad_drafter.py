"""Drafters that cannot be right: each is refused in one sentence that says why and what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bad_input import refused
from test_cli import TEXT, save_tiny, strop_

from strop.decode.checkpoint import new_config, save_drafter
from strop.decode.dflash import DFlashNet
from strop.kv import SnapKV, StreamingLLM
from strop.model import load
from strop.recipe import Recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("target") / "model")


@pytest.fixture(scope="module")
def original(model, tmp_path_factory) -> Path:
    """A drafter of seeded noise."""
    torch.manual_seed(0)
    net = DFlashNet(new_config(load(model).plain, 1, 4, mask_token_id=0, taps=[0, 1]))
    save_drafter(folder := tmp_path_factory.mktemp("drafter") / "drafter", net)
    return folder


@pytest.fixture
def drafter(original, tmp_path) -> Path:
    """A sound drafter to spoil."""
    return shutil.copytree(original, tmp_path / "drafter")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))


def change(drafter: Path, **changes: Any) -> None:
    config = json.loads((drafter / "config.json").read_text())
    (drafter / "config.json").write_text(json.dumps(config | changes))


def another_vocabulary(drafter: Path) -> None:
    change(drafter, vocab_size=300)


def another_width(drafter: Path) -> None:
    change(drafter, hidden_size=64)


def another_depth(drafter: Path) -> None:
    change(drafter, num_target_layers=5)


def another_target(drafter: Path) -> None:
    change(drafter, target_fingerprint="0" * 16)


def block_beyond_the_context(drafter: Path) -> None:
    change(drafter, block_size=300)


def mask_out_of_range(drafter: Path) -> None:
    change(drafter, dflash_config={"mask_token_id": 257, "target_layer_ids": [0, 1]})


def no_config(drafter: Path) -> None:
    (drafter / "config.json").unlink()


def config_without_a_block(drafter: Path) -> None:
    change(drafter, block_size=None)


def texts_only(drafter: Path) -> None:
    shutil.rmtree(drafter)
    drafter.mkdir()
    (drafter / "notes.txt").write_text("hello")


def nowhere(drafter: Path) -> None:
    shutil.rmtree(drafter)


def no_weights(drafter: Path) -> None:
    (drafter / "model.safetensors").unlink()


def truncated(drafter: Path) -> None:
    weights = drafter / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def not_a_number(drafter: Path) -> None:
    weights = load_file(drafter / "model.safetensors")
    weights["fc.weight"][3, 3] = torch.nan
    save_file(weights, drafter / "model.safetensors")


def weight_missing(drafter: Path) -> None:
    weights = load_file(drafter / "model.safetensors")
    weights.pop("norm.weight")
    save_file(weights, drafter / "model.safetensors")


REASONS = {
    another_vocabulary: "drafts for a model of vocabulary 300 and this one has 257: use the drafter made for",
    another_width: "drafts for a model of hidden size 64 and this one has 32: use the drafter made for this",
    another_depth: "drafts for a model of layers 5 and this one has 2: use the drafter made for this model",
    another_target: "was trained for another model of this shape: use the drafter made for this one",
    block_beyond_the_context: "drafts blocks of 300, outside 2 to the model's context of 256",
    mask_out_of_range: "names layers [0, 1] and mask token 257, which this model does not have",
    no_config: "has no readable config.json: is the drafter complete?",
    config_without_a_block: "it needs block_size, num_target_layers and dflash_config with mask_token_id",
    texts_only: "has no readable config.json: is the drafter complete?",
    nowhere: "give ngram, zoo:NAME, or the folder of a drafter or a model",
    no_weights: "holds no model.safetensors: is the drafter complete?",
    truncated: "holds a damaged safetensors file",
    not_a_number: "weight fc.weight holds NaN or infinity: download it again",
    weight_missing: "the weights do not fit sizes, layers and target_layer_ids of config.json",
}


@pytest.mark.parametrize("spoil", REASONS, ids=lambda spoil: spoil.__name__)
def test_a_drafter_that_cannot_be_right_is_refused(model, drafter, spoil):
    spoil(drafter)
    sentence = refused("generate", model, "--prompt", "x", "--draft", drafter)
    assert str(drafter) in sentence and REASONS[spoil] in sentence


def test_a_small_model_must_read_the_same_tokens_and_be_whole(model, tmp_path):
    other = save_tiny(tmp_path / "other", vocab_size=300)
    sentence = refused("generate", model, "--prompt", "x", "--draft", other)
    assert "the drafter knows 300 tokens and the target 257: use a model with the target's" in sentence
    truncated(other)
    assert "truncated" in refused("generate", model, "--prompt", "x", "--draft", other)


def test_an_unknown_bundled_drafter_is_refused(model, drafter, monkeypatch):
    monkeypatch.setenv("STROP_ZOO", str(drafter.parent))
    assert "did you mean 'drafter'" in refused("generate", model, "--prompt", "x", "--draft", "zoo:draftre")


@pytest.mark.parametrize("verb", ["tune", "measure", "generate"])
def test_a_drafter_is_no_language_model(drafter, verb):
    words = ["--prompt", "x"] if verb == "generate" else []
    sentence = refused(verb, drafter, *words)
    assert "holds a drafter, which is no language model by itself: give the model that it drafts" in sentence


@pytest.mark.parametrize(
    "kv", [SnapKV(budget=128), StreamingLLM(budget=128)], ids=lambda kv: type(kv).__name__
)
def test_drafts_over_a_cache_that_evicts_are_refused(model, drafter, tmp_path, kv):
    Recipe(model=str(model), kv=kv).save(tmp_path / "mine.yaml")
    words = ("generate", tmp_path / "mine.yaml", "--prompt", "x", "--draft")
    for name in ("ngram", drafter):
        sentence = refused(*words, name)
        assert "can take back 0" in sentence and "leave one of the two slots empty" in sentence


HOW = {
    "no nodes": (["--draft", "ngram", "--tree", "ddtree", "--budget", "0"], "'--budget'"),
    "nobody drafts": (["--tree", "ddtree"], "add --draft DRAFTER"),
    "a budget for nobody": (["--budget", "4"], "add --draft DRAFTER"),
    "a budget where none is needed": (["--draft", "ngram", "--budget", "4"], "a budget is for ddtree"),
    "an unknown tree": (["--draft", "ngram", "--tree", "oak"], "'--tree'"),
}


@pytest.mark.parametrize("case", HOW)
def test_how_drafts_are_verified_must_make_sense(model, case):
    words, reason = HOW[case]
    assert reason in refused("generate", model, "--prompt", "x", *words)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"def add_{n}(a, b):\n    return a + {n} * b\n\n" for n in range(60)))
    return path


QUICK = ("--tokens", 300, "--steps", 2, "--block", 4)


def test_training_is_refused_what_cannot_work(model, drafter, text, tmp_path):
    words = ("train", "drafter", "--target", model, "--data", text, "--out")
    assert "that no training run wrote: name another folder" in refused(*words, drafter, *QUICK)
    assert "is a file" in refused(*words, text, *QUICK)
    assert "blocks of 60 take rows of 480 tokens" in refused(*words, tmp_path / "new", "--block", 60)
    assert "--steps" in refused(*words, tmp_path / "new", "--steps", 0)
    assert "holds a drafter" in refused("train", "drafter", "--target", drafter, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": TEXT[:90]}))
    few = ("train", "drafter", "--target", model, "--data", tmp_path / "one.jsonl", "--out")
    assert "has 90 tokens, too few to train on: give more text" in refused(*few, tmp_path / "new")


def test_another_run_is_replaced_only_when_asked_for(model, text, tmp_path):
    words = ("train", "drafter", "--target", model, "--data", text, "--out", tmp_path / "out", *QUICK)
    strop_(*words)
    strop_(*words)
    assert "add --resume to replace it" in refused(*words, "--treeflash")
    strop_(*words, "--treeflash", "--resume")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["treeflash_config"]
