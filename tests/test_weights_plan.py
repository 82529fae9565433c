"""Bit plans: averages with known answers, files that come back the same, and wrong files in one sentence."""

import csv
import dataclasses
import io

import pytest

from strop.core.errors import StropError
from strop.weights.grid import Grid
from strop.weights.plan import BitPlan, Row


def row(name, bits, shape=(64, 128), group=32, **rest):
    grid = Grid(bits=bits, group=group, symmetric=rest.pop("symmetric", True))
    expert = ".experts." in name
    effective = rest.pop("effective_bits", grid.effective_bits(shape[1]))
    return Row(name=name, shape=shape, expert=expert, grid=grid, effective_bits=effective, **rest)


def plan(*rows, budget=None):
    said = "gamma is 1.5: the spread of alpha exceeds its error; solved by greedy"
    return BitPlan(
        rows=rows, method="alphaq", budget=budget, gamma=1.5, signal=True, said=said, objective=0.125
    )


MIXED = plan(
    row("model.layers.0.self_attn.q_proj", 8, shape=(16, 16), group=None),
    row("model.layers.0.mlp.experts.0.up_proj", 4, alpha=3.25, alpha_se=0.01, variance=1e-5, measured=0.004),
    row("model.layers.0.mlp.experts.1.up_proj", 2, shape=(64, 384), symmetric=False, sensitivity=2.0),
    budget=2.5,
)


def test_averages_weigh_each_matrix_by_its_weights():
    small, middle, large = 16 * 16, 64 * 128, 64 * 384
    every = (8 * small + 4 * middle + 2 * large) / (small + middle + large)
    assert MIXED.average_bits == pytest.approx(every)
    assert MIXED.expert_average_bits == pytest.approx(2.5)
    assert MIXED.expert_effective_bits == pytest.approx((4.5 * 1 + 3.0 * 3) / 4)
    effective = (9 * small + 4.5 * middle + 3 * large) / (small + middle + large)
    assert MIXED.effective_bits == pytest.approx(effective)


def test_bits_by_name_and_no_average_over_experts_that_are_not_there():
    dense = plan(row("a.b", 3), row("a.c", 5))
    assert dense.bits == {"a.b": 3, "a.c": 5}
    assert dense.average_bits == 4
    assert dense.expert_average_bits is None and dense.expert_effective_bits is None


def test_a_plan_comes_back_the_same_from_a_dict_and_from_a_file(tmp_path):
    assert BitPlan.from_dict(MIXED.to_dict()) == MIXED
    path = tmp_path / "new" / "plan.yaml"
    MIXED.save(path)
    assert BitPlan.load(path) == MIXED
    assert [file.name for file in path.parent.iterdir()] == ["plan.yaml"]
    assert "predicted" not in path.read_text()


def test_the_table_is_flat_and_as_wide_in_every_row():
    table = MIXED.table()
    assert all(list(line) == list(table[0]) for line in table)
    assert not any(isinstance(value, (list, tuple, dict)) for line in table for value in line.values())
    read = list(csv.DictReader(io.StringIO(MIXED.to_csv())))
    assert [line["name"] for line in read] == list(MIXED.bits)
    assert float(read[1]["alpha"]) == 3.25 and read[0]["alpha"] == ""


def test_a_plan_without_rows_is_the_programmers_mistake():
    with pytest.raises(ValueError, match="at least one row"):
        plan()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (plan(row("a.b", 3), row("a.b", 4)), "names a.b twice"),
        (plan(row("a..b", 3)), "no name of a module"),
        (plan(row("re:.*", 3)), "no name of a module"),
        (plan(row("a.b", 3, shape=(4, 40), effective_bits=4.0)), "groups of 32"),
        (plan(row("a.b", 3, shape=(0, 32))), "sizes are positive"),
        (plan(row("a.b", 3, effective_bits=2.0)), "fewer than its 3"),
        (plan(row("a.b", 3), budget=2.9), "its budget is 2.9"),
    ],
)
def test_check_names_what_cannot_be_followed(wrong, words):
    with pytest.raises(StropError, match=words):
        wrong.check()
    with pytest.raises(StropError, match=words):
        BitPlan.from_dict(wrong.to_dict())


def test_a_budget_may_be_for_the_experts_alone_or_count_matrices():
    assert MIXED.average_bits > MIXED.budget
    MIXED.check()
    plan(row("a.b", 4, shape=(640, 128)), row("a.c", 2), budget=3).check()
    with pytest.raises(StropError, match="lower the widths, or raise the budget"):
        dataclasses.replace(MIXED, budget=2.4).check()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("bits", 9, "row 2 of the plan: bits must be 1 to 8, got 9"),
        ("bits", "4", "`bits` in row 2 of the plan must be int, got str"),
        ("bits", True, "must be int, got bool"),
        ("outputs", 2**60, "below 2"),
        ("group", 0, "group must be positive"),
        ("group", [1], "must be int or nothing, got a list"),
        ("alpha", float("nan"), "must be finite"),
        ("expert", 1, "must be bool, got int"),
        ("name", None, "must be str, got nothing"),
        ("alfa", 3.0, "did you mean 'alpha'"),
    ],
)
def test_a_wrong_row_is_named_with_its_field(key, value, words):
    data = MIXED.to_dict()
    data["rows"][1][key] = value
    with pytest.raises(StropError, match=words) as raised:
        BitPlan.from_dict(data)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "starts with `strop_plan: 1`"),
        ("strop_plan: 2\nrows: []", "starts with `strop_plan: 1`"),
        ("strop_plan: 1\nrows: []", "at least one matrix"),
        ("strop_plan: 1\nrows: [3]\nmethod: rtn\nsaid: ''", "row 1 of the plan must be a mapping, got int"),
        ("strop_plan: 1\nrows: [{}]\nsaid: ''", "`method` in the plan must be str, got nothing"),
        ("rows: [", "is not YAML"),
        ("? [a, {b: c}]\n: 1", "is not YAML|starts with"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, text, words):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(StropError, match=words) as raised:
        BitPlan.load(path)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(StropError, match="cannot read plan"):
        BitPlan.load(tmp_path / "none.yaml")
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StropError, match="is not YAML"):
        BitPlan.load(path)
