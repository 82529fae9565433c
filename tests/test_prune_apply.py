"""`strop prune --plan`: edited plans are followed, say so, and are tested on what did not choose them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prune_runs import edited, laid, planned, prune, save_spiking, told_by
from safetensors.torch import load_file, save_file
from test_cli import said, strop_

from strop.prune import PrunePlan, saved
from strop.pruning.subjects import Images, images


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return laid(tmp_path_factory.mktemp("pruned"))


@pytest.fixture(scope="module")
def done(place, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    return planned(place, tmp_path_factory.mktemp("done") / "out")


def test_an_edited_plan_is_applied_without_a_search(place, done, tmp_path):
    plan = edited(done[0] / "prune.yaml", tmp_path / "mine.yaml", blocks_0_mlp=5, stream=12)
    told = prune(place, tmp_path / "out", "--plan", plan, verb=said)
    kept = {row["name"]: (row["kept"], row["planned"]) for row in told["plan"]["rows"]}
    assert kept["blocks.0.mlp"] == (5, 5) and kept["stream"] == (12, 12)
    thin = saved.load(tmp_path / "out")
    assert thin.blocks[0].mlp.fc1.conv.out_channels == 5 and thin.head.in_features == 12
    assert told["plan"]["accuracy"] == Images.evaluate(
        images(thin, place, place / "data.safetensors", 0), thin
    )
    assert "--plan" in told["command"] and "--method" not in told["command"]
    again = prune(place, tmp_path / "again", "--plan", tmp_path / "out" / "prune.yaml", verb=said)
    assert again["parameters"] == told["parameters"] and again["test"] == told["test"]


def test_an_applied_plan_is_tested_on_images_that_it_was_not_chosen_by(place, tmp_path):
    chosen = prune(place, tmp_path / "out", "--method", "uniform", "--tolerance", "90%", "--saving", "40%",
                   "--seed", 7, verb=said)  # fmt: skip
    applied = prune(place, tmp_path / "again", "--plan", tmp_path / "out" / "prune.yaml", verb=said)
    assert applied["test"] == chosen["test"] and applied["drop"] == chosen["drop"]
    parts = [images(saved.load(place / "model"), place, place / "data.safetensors", k).parts for k in (0, 7)]
    assert not torch.equal(parts[0]["test"].inputs, parts[1]["test"].inputs)


def test_an_edited_plan_does_not_pass_for_the_planners(place, done, tmp_path):
    whole = done[0] / "prune.yaml"
    again = prune(place, tmp_path / "same", "--plan", whole, verb=said)["plan"]
    assert again["method"] == "psvit" and again["sensitivity"] == done[1]["plan"]["sensitivity"]
    plan = edited(whole, tmp_path / "mine.yaml", stream=3)
    prune(place, tmp_path / "out", "--plan", plan)
    assert PrunePlan.load(tmp_path / "out" / "prune.yaml").method == "psvit, edited"
    pages = [(folder / "report.html").read_text() for folder in (tmp_path / "out", done[0])]
    assert ["within the tolerance</li>" in page for page in pages] == [False, True]
    assert all("--plan prune.yaml -o DIR" in page for page in pages)
    plan = edited(tmp_path / "out" / "prune.yaml", tmp_path / "more.yaml", stream=2)
    more = prune(place, tmp_path / "more", "--plan", plan, verb=said)["plan"]
    assert more["method"] == "psvit, edited" and more["feasible"] and more["walk"]


def test_a_plan_that_is_applied_on_other_data_leaves_out_what_was_tried_on_its_own(place, done, tmp_path):
    whole = load_file(place / "data.safetensors")
    save_file(whole | {"labels": (whole["labels"] + 1) % 4}, tmp_path / "data.safetensors")
    words = ["--data", tmp_path / "data.safetensors", "--plan", done[0] / "prune.yaml"]
    told = said("prune", place / "model", *words, "-o", tmp_path / "out")
    plan = told["plan"]
    assert plan["dense_accuracy"] != done[1]["plan"]["dense_accuracy"]
    assert not (plan["sensitivity"] or plan["curves"] or plan["walk"] or plan["candidates"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert plan["evaluations"] == 0 and "models evaluated" not in page


def test_other_data_of_the_same_dense_accuracy_is_other_data(place, done, tmp_path):
    inputs = load_file(place / "data.safetensors")["images"]
    images = (
        inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(1))].flip(-1).contiguous()
    )
    with torch.no_grad():
        labels = saved.load(place / "model")(images).argmax(-1)
    save_file({"images": images, "labels": labels}, tmp_path / "data.safetensors")
    words = ["--data", tmp_path / "data.safetensors", "--plan", done[0] / "prune.yaml"]
    plan = said("prune", place / "model", *words, "-o", tmp_path / "out")["plan"]
    assert plan["dense_accuracy"] == done[1]["plan"]["dense_accuracy"] == 1
    assert plan["accuracy"] != done[1]["plan"]["accuracy"] and not plan["sensitivity"]


def test_a_plans_seed_parts_the_data_and_no_other_is_taken(place, done, tmp_path):
    words = ("--plan", done[0] / "prune.yaml", "--seed", 3)
    assert "leave --seed out" in told_by(prune(place, tmp_path / "out", *words, code=2))
    prune(place, tmp_path / "out", *words, "--recover", "finetune")


def test_numbers_of_a_plan_that_were_spoilt_are_taken_from_the_model(place, done, tmp_path):
    data = yaml.safe_load((done[0] / "prune.yaml").read_text())
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(data | {"parameters": 0}))
    told = prune(place, tmp_path / "out", "--plan", tmp_path / "plan.yaml", verb=said)
    assert told["parameters"] == done[1]["parameters"] and told["plan"]["saving"] == data["saving"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(data | {"seed": 10**30}))
    refused = prune(place, tmp_path / "out", "--plan", tmp_path / "plan.yaml", code=2)
    assert "seed is a whole number from 0 to" in told_by(refused)


def test_a_plan_of_another_model_or_one_that_is_spoilt_is_refused(place, done, tmp_path):
    whole = done[0] / "prune.yaml"
    save_spiking(tmp_path / "other", seed=5)
    words = ["--data", place / "data.safetensors", "-o", tmp_path / "out"]
    output = told_by(strop_("prune", tmp_path / "other", *words, "--plan", whole, code=2))
    assert "this plan is of another model" in output

    def refused(plan: Path, *more: object) -> str:
        output = told_by(prune(place, tmp_path / "out", "--plan", plan, *more, code=2))
        assert not (tmp_path / "out").exists()
        return output

    assert "kept must be 1 to 64" in refused(edited(whole, tmp_path / "a.yaml", blocks_0_mlp=65))
    assert "kept must be 1 to 64" in refused(edited(whole, tmp_path / "b.yaml", blocks_0_mlp=0))
    (tmp_path / "c.yaml").write_text(whole.read_text().replace("name: blocks.0.mlp", "name: blocks.0.mlq"))
    assert "did you mean 'blocks.0.mlp'?" in refused(tmp_path / "c.yaml")
    assert "cannot read plan" in refused(tmp_path / "none.yaml")
    (tmp_path / "d.yaml").write_bytes(whole.read_bytes()[:-400])
    refused(tmp_path / "d.yaml")
    assert "leave --tolerance out" in refused(whole, "--tolerance", "1%")
