"""Plans as files: they come back the same, edited ones are followed, wrong ones refused in one sentence."""

import dataclasses

import pytest
import torch
import yaml
from pruning import UNITS, A, B, C, Net, Scripted
from torch import nn

from strop.core.errors import StropError
from strop.core.nodes import construct
from strop.prune.baselines import Uniform
from strop.prune.cut import cut
from strop.prune.plan import PrunePlan
from strop.prune.primesvt import PrimeSVT
from strop.prune.psvit import PSViT
from strop.prune.score import l2
from strop.prune.search import Search

NET = Net().eval()
PLAN = PSViT().plan_units(UNITS, NET, Scripted({A: 0.02, B: 0.05, C: 0.5}))
METHODS = [PSViT(), PrimeSVT(), PrimeSVT(saving=0.6), Uniform(rate=0.3, where="all", score="random", seed=3)]


def tensors(model):
    return dict(model.state_dict())


def same(one, other):
    left, right = tensors(one), tensors(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def edited(plan, **counts):
    """As somebody would in the file."""
    data = yaml.safe_load(plan.to_yaml())
    for row in data["rows"]:
        row["kept"] = counts.get(row["name"].replace(".", "_"), row["kept"])
    return data


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_plan_comes_back_the_same_from_a_dict_and_from_a_file(method, tmp_path):
    plan = method.plan_units(UNITS, NET, Scripted({A: 0.02, B: 0.05, C: 0.5}))
    assert PrunePlan.from_dict(plan.to_dict()) == plan and not plan.edited
    path = tmp_path / "new" / "plan.yaml"
    plan.save(path)
    assert PrunePlan.load(path) == plan
    assert [file.name for file in path.parent.iterdir()] == ["plan.yaml"]


def test_applied_twice_gives_the_same_tensors_and_leaves_the_model():
    before = {name: tensor.clone() for name, tensor in tensors(NET).items()}
    thin = PLAN.apply(NET, UNITS)
    assert same(thin, PLAN.apply(NET, UNITS)) and same(thin, PLAN.apply(Net(), UNITS))
    assert all(torch.equal(tensors(NET)[name], tensor) for name, tensor in before.items())
    assert thin.blocks[0].fc1.out_features == 10 and thin.blocks[1].fc2.in_features == 6
    assert sum(parameter.numel() for parameter in thin.parameters()) == 720


def test_units_are_traced_where_none_are_given():
    method = PrimeSVT()
    plan = method.plan(NET, Scripted({A: 0.02, B: 0.05, C: 0.5}))
    assert plan.counts == method.plan_units(UNITS, NET, Scripted({A: 0.02, B: 0.05, C: 0.5})).counts
    thin = method.apply(NET, Scripted({A: 0.02, B: 0.05, C: 0.5}))
    assert same(thin, plan.apply(NET)) and same(thin, plan.apply(NET, UNITS))


def test_a_plan_is_applied_to_a_model_that_says_nothing_of_its_input():
    bare = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    example = {"input": torch.ones(2, 3)}
    plan = Uniform(rate=0.5, where="all").plan(bare, example=example)
    assert plan.apply(bare, example=example)[2].out_features == 3
    with pytest.raises(StropError, match="pass example="):
        plan.apply(bare)


def test_cut_at_once_equals_cut_unit_by_unit():
    kept = Search(UNITS, NET, None, l2).kept(PLAN.counts)
    one = cut(NET, UNITS, {A: kept[A]})
    again = Search(UNITS, one, None, l2).kept({B: PLAN.counts[B]})
    assert same(cut(one, UNITS, again), PLAN.apply(NET, UNITS))


def test_the_committed_model_is_the_one_that_was_evaluated():
    seen = []

    def evaluate(model):
        seen.append(model)
        return Scripted({A: 0.02, B: 0.05, C: 0.5})(model)

    plan = PrimeSVT(saving=0.6).plan_units(UNITS, NET, evaluate)
    thin = plan.apply(NET, UNITS)
    sizes = {name: tensor.shape for name, tensor in tensors(thin).items()}
    twins = [one for one in seen if {name: t.shape for name, t in tensors(one).items()} == sizes]
    assert len(twins) == 1 and same(twins[0], thin)


def test_an_edited_plan_is_followed_and_says_that_it_is_edited():
    plan = PrunePlan.from_dict(edited(PLAN, blocks_0=3, stream=8, stem_0=9))
    assert plan.edited and plan.counts[A] == 3
    thin = plan.apply(NET, UNITS)
    assert thin.blocks[0].fc1.weight.shape == (3, 8) and thin.stem[0].out_features == 9
    assert thin(torch.ones(2, 5)).shape == (2, 15)


def test_a_row_that_is_taken_out_leaves_its_unit_whole():
    data = edited(PLAN)
    data["rows"], data["candidates"] = data["rows"][:-1], []
    thin = PrunePlan.from_dict(data).apply(NET, UNITS)
    assert thin.blocks[0].fc1.out_features == 10 and thin.blocks[1].fc1.out_features == 10


def test_channels_by_lot_are_those_of_the_seed():
    method = Uniform(rate=0.5, score="random", seed=1)
    plan = method.plan_units(UNITS, NET)
    assert plan.accuracy is None and plan.dense_accuracy is None and plan.evaluations == 0
    again = PrunePlan.from_dict(plan.to_dict()).apply(NET, UNITS)
    assert same(again, plan.apply(NET, UNITS))
    assert not same(again, dataclasses.replace(plan, seed=2).apply(NET, UNITS))
    assert not same(again, dataclasses.replace(plan, score="l2").apply(NET, UNITS))


def test_another_model_is_refused():
    with pytest.raises(StropError, match="of another model"):
        PLAN.apply(Net(seed=1), UNITS)
    with pytest.raises(StropError, match="of another model"):
        PLAN.apply(Net().double(), UNITS)
    with pytest.raises(StropError, match="of another model"):
        PLAN.apply(PLAN.apply(NET, UNITS), UNITS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "blocks.7"}, "no unit 'blocks.7'.*did you mean 'blocks"),
        ({"width": 30}, "blocks.0 has 20 channels in 1 heads, and 30"),
        ({"heads": 2}, "change `kept` alone"),
    ],
)
def test_a_unit_that_the_model_does_not_have_is_named(change, words):
    rows = tuple(dataclasses.replace(row, **change) if row.name == A else row for row in PLAN.rows)
    with pytest.raises(StropError, match=words):
        dataclasses.replace(PLAN, rows=rows).apply(NET, UNITS)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("kept", 0, "blocks.0: kept must be 1 to 20, got 0"),
        ("kept", 21, "kept must be 1 to 20, got 21"),
        ("kept", -3, "kept must be 1 to 20"),
        ("kept", 7.5, "blocks.0.kept must be int, got 7.5"),
        ("kept", True, "must be int, got True"),
        ("kept", "half", "must be int, got 'half'"),
        ("heads", 3, "20 channels do not divide into 3 heads"),
        ("heads", 4, "a multiple of 4, got 10"),
        ("heads", 0, "do not divide"),
        ("keep", 5, "no field 'keep'; did you mean 'kept'"),
        ("name", "blocks.1", "blocks.1 has two rows"),
        ("name", None, "rows 4.name must be str"),
    ],
)
def test_a_wrong_row_is_named_with_its_field(key, value, words):
    data = PLAN.to_dict()
    data["rows"][3][key] = value
    with pytest.raises(StropError, match=words) as raised:
        PrunePlan.from_dict(data)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("strop_prune", 2, "starts with `strop_prune: 1`"),
        ("tolerance", 0.03, "the plan has no field 'tolerance'"),
        ("score", 3, "the plan.score must be str"),
        ("saving", None, "the plan.saving must be float, got None"),
        ("saving", float("nan"), "shares from 0 to 1"),
        ("accuracy", 87.0, "shares from 0 to 1"),
        ("rows", {}, "`rows` in the plan is a list"),
        ("rows", [3], "rows 1 takes `field: value` pairs, got 3"),
        ("rows", [{}], "rows 1: .*missing"),
        ("rows", [], "set its `kept` to its width"),
        (
            "walk",
            [{"what": "x", "rate": 0.1, "accuracy": 2.0, "saving": 0.1, "accepted": True}],
            "walk 1: .*from 0 to 1",
        ),
        ("curves", [{"what": "x", "rate": [0.1]}], "curves 1.rate must be float"),
        ("candidates", [{"kept": [1, "2"], "accuracy": 0.5, "saving": 0.1}], "candidates 1.kept must be int"),
        ("frozen", [["a"]], "lists names with reasons"),
        ("frozen", "a", "`frozen` in the plan is a list"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_sentence(key, value, words):
    with pytest.raises(StropError, match=words) as raised:
        PrunePlan.from_dict(PLAN.to_dict() | {key: value})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "starts with"), ("rows: [", "is not YAML"), ("!!python/object/apply:os.getcwd []", "is not YAML")],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, text, words):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(StropError, match=words):
        PrunePlan.load(path)
    with pytest.raises(StropError, match="cannot read plan"):
        PrunePlan.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_fields_come_back_from_yaml_as_recipes_have_them(method):
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in method.fields().items()}
    read = yaml.safe_load(yaml.safe_dump(fields))
    assert construct(type(method), read, "prune", lambda where, node, wanted: None) == method
