"""PMQ, which looks at text: budgets have room for experts at 2 and 3 bits, and settings find their owner."""

import numpy as np
import pytest
import torch
from quantizing import build, rows, save

from strop import quantize as engine
from strop.core.errors import StropError
from strop.core.hooks import decoder_layers
from strop.recipe import Recipe
from strop.weights import GPTQ, PMQ, RTN, AlphaQ
from strop.weights.experts import has_experts

W4 = RTN(bits=4, group=32, symmetric=False)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build("qwen2_moe", num_experts=8)


@pytest.mark.parametrize(
    ("widths", "budget", "kept"),
    [
        ((1, 2, 3), 1.3, False),
        ((1, 2, 3), 1.375, True),
        ((1, 2, 3), 2.0, True),
        ((2, 3, 4), 2.0, False),
        ((2, 3, 4), 2.125, True),
    ],
)
def test_a_budget_is_kept_with_experts_at_2_and_3_bits_where_it_has_room(widths, budget, kept, model):
    method = PMQ(bits=budget, widths=widths, quantizer=W4)
    plan = method.plan(method.walk(model, rows))
    for layer in ("model.layers.0.", "model.layers.1."):
        bits = [row.grid.bits for row in plan.experts if row.name.startswith(layer)]
        assert np.mean(bits) <= budget
        assert ({2, 3} <= set(bits)) == kept


def test_settings_that_a_method_lacks_are_its_quantizers():
    told = {"quantizer": "gptq", "samples": 4, "seed": 7, "percdamp": 0.1}
    by = GPTQ(symmetric=False, samples=4, percdamp=0.1)
    assert engine.spelled("zoo:moe", "alphaq", **told).weights == AlphaQ(seed=7, quantizer=by)
    by = GPTQ(symmetric=False, percdamp=0.1)
    assert engine.spelled("zoo:moe", "pmq", **told).weights == PMQ(seed=7, samples=4, quantizer=by)
    with pytest.raises(StropError, match="alphaq has no field 'samples'"):
        engine.spelled("zoo:moe", "alphaq", samples=4)


@pytest.mark.parametrize(
    "method",
    [
        PMQ(bits=2.5, quantizer=W4, samples=4, length=64, calibration="text.txt"),
        AlphaQ(quantizer=GPTQ(bits=4, group=32, samples=4, length=64, calibration="text.txt")),
    ],
    ids=["own", "nested"],
)
def test_the_kept_recipe_is_what_ran_and_holds_from_any_folder(method, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 40)
    save(build("qwen2_moe", torch.bfloat16), tmp_path / "model")
    seen, read = [], engine.calibration_rows
    monkeypatch.setattr(engine, "calibration_rows", lambda *given: seen.append(given[2]) or read(*given))
    monkeypatch.chdir(tmp_path)
    engine.quantize(Recipe(model="model", weights=method), tmp_path / "out")
    kept = Recipe.load(tmp_path / "out" / "strop.yaml")
    assert kept.model == str(tmp_path / "model")
    assert kept.weights.asked.calibration == str(tmp_path / "text.txt")
    assert seen == [kept.weights.asked]


@pytest.mark.parametrize("inner", [5, "text", [], {}, None, True, {"num_experts": None}])
def test_any_json_says_whether_there_are_experts(inner):
    assert not has_experts({"text_config": inner})
    assert has_experts({"text_config": {"num_experts": 4}})
    assert has_experts({"text_config": 5, "num_experts": 4})


def test_a_model_without_a_list_of_layers_is_refused_for_any_use():
    odd = build("llama")
    odd.config.num_hidden_layers = 3
    with pytest.raises(
        StropError, match="LlamaForCausalLM has no list of 3 decoder layers: leave its weights"
    ):
        decoder_layers(odd)
