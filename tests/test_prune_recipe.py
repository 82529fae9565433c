"""The prune slot of a recipe: files that round-trip, what it does to a model, and how it composes."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from counts import SOAK
from quantizing import TOKENS
from test_cli import TEXT, said, save_tiny, strop_

from strop import load
from strop.core.errors import StropError
from strop.kv import KVarN
from strop.model import Model
from strop.prune import PrimeSVT, PSViT, Uniform
from strop.recipe import METHODS, Recipe, candidates
from strop.weights import RTN

ROOMY = {"tolerance": 0.9, "step": 0.4, "probe": (0.4, 0.8)}
METHODS_SET = [
    PSViT(**ROOMY),
    PrimeSVT(epsilon=0.9, saving=0.1, mode="maximise", order="benefit", reserve=0.2, rates=(0.25, 0.5)),
    Uniform(rate=0.5, where="all", round_to=8, score="random", seed=3),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("recipe") / "model")


@pytest.fixture(scope="module")
def lm(tiny) -> Model:
    return load(tiny)


def size(model: Model) -> int:
    return sum(p.numel() for p in model.model.parameters())


@pytest.mark.parametrize("method", METHODS_SET, ids=lambda method: type(method).__name__)
def test_a_recipe_with_a_prune_slot_round_trips(method, tmp_path):
    recipe = Recipe(model="zoo:coder", prune=method, weights=RTN(bits=8))
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    assert list(recipe.methods()) == ["prune", "weights"] and " + rtn int8" in recipe.label()
    assert recipe.digest() != replace(recipe, prune=replace(method, seed=9)).digest()


@pytest.mark.parametrize(
    ("slot", "words"),
    [
        ("magic", "known: primesvt, psvit, uniform"),
        ({"psvit": {"epsilon": 0.1}}, "psvit has no field 'epsilon'"),
        ({"psvit": {"tolerance": 1.5}}, "tolerance is a share from 0 to 1"),
        ({"primesvt": {"rates": [0.5, 0.1]}}, "rising rates"),
        ({"primesvt": {"order": "magic"}}, "order must be one of"),
        ({"uniform": {"rate": 1}}, "rising rates"),
        ({"uniform": {"rate": float("nan")}}, "rising rates"),
    ],
)
def test_a_slot_that_is_wrong_is_told_in_a_sentence(slot, words):
    with pytest.raises(StropError, match=words):
        Recipe.from_dict({"strop": 1, "prune": slot})


@pytest.mark.parametrize("method", METHODS_SET, ids=lambda method: type(method).__name__)
def test_the_slot_cuts_the_model_and_leaves_the_checkpoint(method, lm):
    before = {name: tensor.clone() for name, tensor in lm.plain.state_dict().items()}
    thin = lm.with_(prune=method)
    assert size(thin) < size(lm) and thin.weight_bytes() < lm.weight_bytes()
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.plain.state_dict().items())
    again = lm.with_(prune=method)
    assert torch.equal(thin.model(TOKENS).logits, again.model(TOKENS).logits)
    assert thin.generate(["def"], max_new_tokens=4) == again.generate(["def"], max_new_tokens=4)


def test_pruning_comes_before_weights_and_is_not_done_twice(lm):
    thin = lm.with_(prune=Uniform(rate=0.5))
    both = thin.with_(weights=RTN(bits=8, group=16))
    assert both.pruned is thin.pruned
    packed = both.model.model.layers[0].mlp.up_proj
    assert packed.out_features == thin.model.model.layers[0].mlp.up_proj.out_features == 32
    whole = lm.with_(prune=Uniform(rate=0.5), weights=RTN(bits=8, group=16))
    assert torch.equal(whole.model(TOKENS).logits, both.model(TOKENS).logits)
    assert both.with_(kv=KVarN(bits_k=4, bits_v=4, group=16, tail=32)).model is both.model
    assert both.with_(prune=None, weights=None).model is lm.plain
    assert both.with_(prune=None).model.model.layers[0].mlp.up_proj.out_features == 64


def test_what_cannot_be_met_is_refused_and_does_not_pass_for_pruned(lm):
    with pytest.raises(StropError, match="at most: ask for less, or allow a larger drop"):
        lm.with_(prune=PrimeSVT(epsilon=0.9, saving=0.95, rates=(0.5,)))


def test_a_recipe_file_with_a_prune_slot_is_loaded_generated_from_and_measured(tiny, tmp_path):
    path = tmp_path / "recipe.yaml"
    kv = KVarN(bits_k=4, bits_v=4, group=16, tail=32)
    Recipe(model=str(tiny), prune=Uniform(rate=0.5), kv=kv).save(path)
    thin = load(path)
    assert thin.model.model.layers[1].mlp.down_proj.in_features == 32
    told = said("generate", path, "--prompt", "def f", "--max-new-tokens", 4)
    assert told["recipe"]["prune"] == {"uniform": Uniform(rate=0.5).fields()}
    output = " ".join(strop_("quantize", path, "-o", tmp_path / "out", code=2).output.split())
    assert "quantize writes weights alone" in output
    (tmp_path / "data.txt").write_text(TEXT[:600])
    row = said("measure", path, "--data", tmp_path / "data.txt", "--context", 16)
    assert row["status"] == "measured" and row["slots"]["prune"] == "uniform"


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="long: make soak")
def test_tune_tries_it_when_it_is_named_and_not_by_itself(tiny, tmp_path):
    assert candidates(64)["prune"] == () and set(METHODS["prune"]) == {"psvit", "primesvt", "uniform"}
    (tmp_path / "data.txt").write_text(TEXT[:600])
    words = ["--data", tmp_path / "data.txt", "--methods", "uniform,rtn", "--context", 16]
    words += ["--max-drop", "99%"]
    told = json.loads(strop_("tune", tiny, *words, "--out", tmp_path / "out", "--json").stdout)
    rows = {row["label"]: row for row in told["rows"]}
    thin, both = rows["uniform"], rows["uniform + rtn int8"]
    assert thin["status"] == both["status"] == "measured", (thin["reason"], both["reason"])
    assert thin["memory"]["weights_bytes"] < rows["as is"]["memory"]["weights_bytes"]
    assert both["memory"]["weights_bytes"] < rows["rtn int8"]["memory"]["weights_bytes"]
    assert thin["quality"]["kl"] > 0 and both["quality"]["kl"] != rows["rtn int8"]["quality"]["kl"]
