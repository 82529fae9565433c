"""Values of any length and size, in files that users write or download: one short sentence."""

import json

import pytest
import torch
import yaml
from quantizing import build, save, tensors_of

from strop.core.checkpoint import INDEX, inspect
from strop.core.errors import StropError, quoted, reason
from strop.decode.cost import CostModel
from strop.model import load
from strop.recipe import Recipe
from strop.weights.plan import BitPlan

LONG, HUGE = "a/" * 2000, 10**400
ROW = {
    "name": "layers.0.up", "outputs": 64, "inputs": 64, "expert": False, "bits": 4, "group": 32,
    "symmetric": True, "effective_bits": 4.5,
}  # fmt: skip


def sentence(read, path) -> str:
    """How a file is refused."""
    with pytest.raises(StropError) as refused:
        read(path)
    said = str(refused.value)
    assert "\n" not in said and len(said) < 500 + len(str(path)), said
    return said


def test_a_value_is_quoted_whole_where_it_is_short():
    assert quoted("abc") == "'abc'" and quoted(None) == "None" and quoted([1, 2]) == "[1, 2]"
    assert quoted("x" * 5000).startswith("'xxx") and quoted("x" * 5000).endswith("x...")


@pytest.mark.parametrize(
    "value",
    ["x" * 5000, 1 << 20_000, [[0] * 5000], {"x" * 5000: 1}],
    ids=["text", "number", "list", "mapping"],
)
def test_a_value_of_any_size_is_quoted_in_short(value):
    deep = value
    for _ in range(100_000):
        deep = [deep]
    assert 0 < len(quoted(value)) <= 100 and 0 < len(quoted(deep)) <= 100


def test_a_reason_is_one_short_line():
    assert reason(ValueError("a\nb")) == "a b" and reason(ValueError()) == "ValueError"
    assert len(reason(ValueError("x" * 5000))) == 300


@pytest.mark.parametrize(
    ("node", "named"),
    [
        ({LONG: None}, "unknown slot"),
        ({"weights": LONG}, "unknown weights method"),
        ({"weights": {"rtn": {LONG: 1}}}, "rtn has no field"),
        ({"weights": {"rtn": LONG}}, "field: value"),
        ({"weights": [LONG]}, "holds one node"),
        ({"weights": {"alphaq": {"widths": [LONG]}}}, "alphaq.widths must be int"),
        ({"weights": {"alphaq": {"weighting": LONG}}}, "weighting must be one of"),
        ({"weights": {"alphaq": {"gamma": HUGE}}}, "alphaq.gamma must be"),
        ({"model": [LONG]}, "names a folder"),
        ({"strop": LONG}, "starts with `strop: 1`"),
    ],
)
def test_a_recipe_is_refused_in_short(tmp_path, node, named):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"strop": 1} | node))
    assert named in sentence(Recipe.load, path)


@pytest.mark.parametrize("value", ["!!timestamp 1", "!!bool x", "!!int ''", "!!float x", "!!binary \u00e9"])
@pytest.mark.parametrize("read", [Recipe.load, BitPlan.load])
def test_a_value_that_is_not_what_its_tag_says_is_refused(tmp_path, read, value):
    path = tmp_path / "r.yaml"
    path.write_text(f"strop: {value}\n")
    assert "is not YAML" in sentence(read, path)


def test_a_bit_plan_is_refused_in_short(tmp_path):
    path, told = tmp_path / "p.yaml", {"strop_plan": 1, "method": "alphaq", "signal": True, "said": "so"}
    path.write_text(yaml.safe_dump(told | {"rows": [ROW | {"name": LONG}]}))
    assert "is no name of a module" in sentence(BitPlan.load, path)


@pytest.mark.parametrize(
    "change",
    [
        {"strop": LONG},
        {"curves": {"64": {"1": LONG, "8": 0.2}}},
        {"curves": {"64": {"1": HUGE, "8": 0.2}}},
        {"curves": {"64": {"1": 0.1, str(HUGE): 0.2}}},
        {"draft_s": HUGE},
    ],
)
def test_a_cost_model_is_refused_in_short(tmp_path, change):
    path = tmp_path / "c.json"
    told = {"strop": 1, "curves": {"64": {"1": 0.1, "8": 0.2}}, "draft_s": 0.1, "draft_slope": 0, "node_s": 0}
    path.write_text(json.dumps(told | change))
    assert "cannot read the cost model" in sentence(CostModel.load, path)


@pytest.fixture
def sharded(tmp_path):
    return save(build("qwen3", torch.bfloat16), tmp_path / "model", "30KB")


@pytest.mark.parametrize("name", [7, 1.5, True, None, [], {}, LONG])
def test_an_index_with_a_name_that_is_none_is_refused(sharded, name):
    told = json.loads((sharded / INDEX).read_text())
    told["weight_map"][min(told["weight_map"])] = name
    (sharded / INDEX).write_text(json.dumps(told))
    assert ("lacks 1 shard" if name == LONG else "not a valid shard index") in sentence(inspect, sharded)


def test_more_layers_than_a_number_can_show_are_refused_in_short(sharded):
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**4000}))
    assert "layers by config.json" in sentence(inspect, sharded)


@pytest.mark.parametrize("token", [HUGE, [0, HUGE], "2", 1.5, [[0]], True])
@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id", "pad_token_id"])
def test_a_token_that_is_none_is_refused(sharded, key, token):
    assert len(tensors_of(sharded)) > 3
    (sharded / "generation_config.json").write_text(json.dumps({key: token}))
    said = sentence(load, sharded)
    assert key in said or "cannot load" in said
