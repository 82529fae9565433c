"""`strop prune`: what it writes, prints, exits with and refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_runs import laid, planned, prune, save_spiking, told_by
from quantizing import build, save
from safetensors.torch import load_file, save_file
from test_cli import ROOT, said, strop_
from test_prune_saved import vit

from strop import load
from strop.core.files import alone
from strop.prune import PrunePlan, saved
from strop.pruning.subjects import Images, images
from strop.tasks.digits import Camera

KILLED = """
import os, signal, sys
from strop.prune import saved
saved.write_json = lambda path, value: os.kill(os.getpid(), signal.SIGKILL)
from strop.cli import main
main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return laid(tmp_path_factory.mktemp("pruned"))


@pytest.fixture(scope="module")
def done(place, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    return planned(place, tmp_path_factory.mktemp("done") / "out")


def test_the_folder_holds_the_model_that_was_measured(place, done):
    out, told = done
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "prune.yaml", "report.html",
    }  # fmt: skip
    thin, plan = saved.load(out), PrunePlan.load(out / "prune.yaml")
    sizes = [sum(p.numel() for p in model.parameters()) for model in (saved.load(place / "model"), thin)]
    assert told["parameters"] == sizes and told["feasible"] and plan.feasible
    assert 1 - sizes[1] / sizes[0] == pytest.approx(plan.saving) and plan.saving > 0.1
    subject = images(thin, place / "model", place / "data.safetensors", seed=0)
    assert isinstance(subject, Images) and subject.counts == {"plan": 30, "test": 30, "recover": 30}
    assert float(subject.right(thin, "test").mean()) == told["test"]["final"]["accuracy"]
    assert told["test"]["dense"]["accuracy"] == plan.dense_accuracy == 1
    assert told["drop"]["accuracy"] == pytest.approx(1 - told["test"]["final"]["accuracy"])
    assert 0 < told["test"]["dense"]["stderr"] < told["test"]["final"]["stderr"] < 0.1


def test_recovery_steps_are_reported_apart_and_kept_where_they_help(done):
    out, told = done
    bn, tuned = told["steps"]
    assert (bn["step"], tuned["step"]) == ("bn", "finetune")
    assert bn["before"] == told["plan"]["accuracy"]
    assert tuned["before"] == (bn["after"] if bn["kept"] else bn["before"])
    assert all(step["kept"] == (step["after"] >= step["before"]) for step in told["steps"])
    assert PrunePlan.load(out / "prune.yaml").accuracy == bn["before"]  # the plan is without recovery


def test_what_is_printed_fits_and_says_the_plan(place, tmp_path):
    words = ("--method", "uniform", "--saving", "20%", "--tolerance", "90%")
    result = prune(place, tmp_path / "out", *words)
    *lines, folder = result.stdout.splitlines()
    assert folder.startswith("Folder: ") and max(map(len, lines)) <= 80
    output = told_by(result)
    assert "uniform saves 2" in output and "Parameters" in output and "blocks.0.mlp" in output
    assert "On data that nothing was chosen by" in output and "30 to test on" in output
    assert "the model, prune.yaml to edit, report.html" in output


def test_what_cannot_be_met_is_exit_code_1_with_a_frontier_and_no_model(place, tmp_path):
    out = tmp_path / "out"
    prune(place, out, "--method", "uniform", "--saving", "10%", "--tolerance", "90%")
    assert (out / "config.json").exists()
    words = ("--method", "primesvt", "--saving", "90%", "--tolerance", "1%")
    output = told_by(prune(place, out, *words, code=1))
    assert "What was asked for cannot be met" in output and "The frontier:" in output
    assert "no plan meets a drop of 1 % at most and a saving of 90 %" in output
    assert {path.name for path in out.iterdir()} == {"prune.yaml", "report.html"}
    plan = PrunePlan.load(out / "prune.yaml")
    assert not plan.feasible and plan.dense_accuracy - plan.accuracy <= 0.01 + 1e-9
    assert plan.candidates
    told = prune(place, tmp_path / "uniform", "--method", "uniform", "--saving", "40%", "--json",
                 "--tolerance", "0%", code=1)  # fmt: skip
    assert json.loads(told.stdout)["feasible"] is False


def test_groups_are_printed_in_full_and_nothing_is_written(place):
    output = strop_("prune", place / "model", "--groups").stdout
    assert "blocks.0.mlp: 64 channels (inner, block)" in output
    assert "consumer  blocks.0.mlp.fc2.conv.weight  dim 1 = [64]" in output
    assert "frozen: head.weight[0]: it is the model's output" in output
    told = said("prune", place / "lm", "--groups")
    assert told["units"][0]["axes"][0]["role"] == "producer"


def test_a_language_model_is_judged_by_next_tokens_and_stays_one(place, tmp_path):
    words = ["--data", place / "text.txt", "-o", tmp_path / "out", "--method", "uniform"]
    told = said("prune", place / "lm", *words, "--saving", "20%", "--tolerance", "90%", "--round-to", 8,
                "--recover", "finetune")  # fmt: skip
    assert told["what"] == "next tokens predicted right" and told["data"]["plan"] >= 1
    assert {row["kept"] % 8 for row in told["plan"]["rows"] if row["name"].endswith("mlp")} == {0}
    step = told["steps"][0]
    assert step["after"] > step["before"]  # noise learns a text of one line over and over
    lm = load(tmp_path / "out")
    assert sum(p.numel() for p in lm.model.parameters()) == told["parameters"][1]
    said("generate", tmp_path / "out", "--prompt", "def", "--max-new-tokens", 3)


def test_an_image_classifier_of_transformers_is_pruned_by_a_file(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path / "vit")
    torch.manual_seed(1)
    pixels = torch.randn(12, 1, 16, 16)
    with torch.no_grad():
        labels = model(pixels).logits.argmax(-1)
    save_file({"pixel_values": pixels, "labels": labels}, tmp_path / "data.safetensors")
    words = ["--data", tmp_path / "data.safetensors", "--method", "uniform", "--tolerance", "99%"]
    told = said("prune", tmp_path / "vit", *words, "--saving", "30%", "-o", tmp_path / "out")
    assert told["kind"] == "ViTForImageClassification" and told["test"]["dense"]["accuracy"] == 1
    thin = saved.load(tmp_path / "out")
    assert sum(p.numel() for p in thin.parameters()) == told["parameters"][1] <= 0.7 * told["parameters"][0]


def test_a_folder_of_the_zoo_names_its_task(place, tmp_path):
    still, moving = tmp_path / "still", tmp_path / "moving"
    model = save_spiking(still, classes=10)
    (still / "training.json").write_text('{"camera": null}')
    subject = images(model, still, None, 0)
    assert subject.counts == {"plan": 300, "test": 300, "recover": 1197}
    model = save_spiking(moving, classes=10, channels=2)
    camera = {"steps": 2, "size": 16, "reach": 3.0, "threshold": 0.15, "clutter": 0}
    (moving / "training.json").write_text(json.dumps({"camera": camera}))
    subject = images(model, moving, None, 0)
    assert subject.counts["plan"] == 4 * 300 and subject.parts["plan"].inputs.shape[1:] == (2, 2, 16, 16)
    assert len(subject.right(model, "plan")) == 300  # recordings of one image count as one
    assert Camera(**camera).steps == subject.parts["test"].inputs.shape[1]
    (moving / "training.json").write_text('{"camera": {"pixels": 3}}')
    words = ["prune", moving, "-o", tmp_path / "out"]
    assert "does not say what the model looks at" in told_by(strop_(*words, code=2))
    (moving / "training.json").unlink()
    assert "give --data FILE.safetensors" in told_by(strop_(*words, code=2))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tolerance", "100%"], "is not a share from 0% to below 100%"),
        (["--tolerance", "250%"], "is not a share"),
        (["--tolerance", "-1%"], "is not a share"),
        (["--tolerance", "nan"], "is not a share"),
        (["--saving", "100%"], "is not a share"),
        (["--method", "magic"], "psvit"),
        (["--mode", "maximise"], "mode is a setting of primesvt"),
        (["--reserve", "10%"], "reserve is a setting of primesvt"),
        (["--order", "size", "--method", "uniform"], "order is a setting of primesvt"),
        (["--recover", "bn,magic"], "no step is called 'magic'"),
        (["--recover", ""], "no step is called ''"),
        (["--round-to", "0"], "round-to"),
        (["--method", "uniform", "--saving", "99%"], "is the most; ask for less"),
    ],
)
def test_absurd_settings_are_refused_in_a_sentence(place, tmp_path, words, told):
    output = told_by(prune(place, tmp_path / "out", *words, code=2))
    assert told in output and not (tmp_path / "out").exists()


def test_data_that_does_not_suit_is_refused_in_a_sentence(place, tmp_path):
    whole = load_file(place / "data.safetensors")
    file = tmp_path / "data.safetensors"

    def refused(**changed: Any) -> str:
        save_file({n: t for n, t in (whole | changed).items() if t is not None}, file)
        output = told_by(strop_("prune", place / "model", "--data", file, "-o", tmp_path / "out", code=2))
        assert not (tmp_path / "out").exists()
        return output

    pictures, labels = whole["images"], whole["labels"]
    spoilt = pictures.clone()
    spoilt[3, 0, 0, 0] = torch.inf
    assert "images and labels are needed" in refused(labels=None)
    assert "one whole number an image is needed" in refused(labels=labels[1:])
    assert "one whole number an image is needed" in refused(labels=labels.float())
    assert "not finite" in refused(images=spoilt)
    assert "the model knows 0 to 3" in refused(labels=labels + 4)
    assert "the model knows 0 to 3" in refused(labels=labels - 4)
    assert "images are [B, 1, H, W]" in refused(images=pictures[:, 0])
    assert "too few" in refused(images=pictures[:2], labels=labels[:2])
    file.write_bytes((place / "data.safetensors").read_bytes()[:-9])
    words = ["prune", place / "model", "-o", tmp_path / "out", "--data"]
    assert "truncated or not a safetensors file" in told_by(strop_(*words, file, code=2))
    assert "is missing" in told_by(strop_(*words, tmp_path / "none.safetensors", code=2))
    (tmp_path / "short.txt").write_text("def " * 100)
    given = ["--data", tmp_path / "short.txt", "-o", tmp_path / "out"]
    assert "too few to plan on some" in told_by(strop_("prune", place / "lm", *given, code=2))


def test_models_that_cannot_be_pruned_are_refused_in_a_sentence(place, tmp_path):
    text = ["--data", place / "text.txt", "-o", tmp_path / "out"]
    fixed = save(build("mixtral", num_attention_heads=1, num_key_value_heads=1), tmp_path / "fixed")
    output = told_by(strop_("prune", fixed, *text, code=2))
    assert "no channels of this MixtralForCausalLM can be cut" in output
    assert "has no batch norm" in told_by(strop_("prune", place / "lm", *text, "--recover", "bn", code=2))
    assert "no model folder" in told_by(strop_("prune", tmp_path / "none", *text, code=2))
    assert "no bundled model" in told_by(strop_("prune", "zoo:none", *text, code=2))
    shutil.copytree(place / "model", tmp_path / "spoilt")
    weights = load_file(tmp_path / "spoilt" / "model.safetensors")
    weights["head.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "spoilt" / "model.safetensors")
    assert "no finite number" in told_by(strop_("prune", tmp_path / "spoilt", *text, code=2))
    assert "where to write is missing" in told_by(strop_("prune", place / "model", code=2))
    assert not (tmp_path / "out").exists()


def test_folders_that_are_taken_stay_as_they_are(place, tmp_path):
    own = told_by(prune(place, place / "model", code=2))
    assert "is the model's own folder" in own
    assert "is the model's own folder" in told_by(prune(place, place / "model" / "in", code=2))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    assert "holds files that `strop prune` did not write" in told_by(prune(place, tmp_path / "notes", code=2))
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["diary.txt"]
    (tmp_path / "kept").mkdir()
    for name in ("prune.yaml", "model-00001-of-00002.safetensors", "model-of-last-week.safetensors"):
        (tmp_path / "kept" / name).write_text("mine")
    assert "holds files that `strop prune` did not write" in told_by(prune(place, tmp_path / "kept", code=2))
    (tmp_path / "file").write_text("x")
    assert "it is a file" in told_by(prune(place, tmp_path / "file", code=2))
    with alone(tmp_path / "held"):
        assert "another run is at work" in told_by(prune(place, tmp_path / "held", code=2))


def test_a_run_that_is_killed_leaves_what_was_there_and_nothing_half(place, tmp_path):
    out = tmp_path / "out"
    words = ["prune", place / "model", "--data", place / "data.safetensors", "-o", out, "--tolerance", "90%"]
    words = [str(word) for word in words] + ["--method", "uniform", "--saving"]
    strop_(*words, "10%")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    line = [sys.executable, "-c", KILLED, *words, "20%"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run(line, capture_output=True, env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    hidden = [path for path in tmp_path.iterdir() if path != out]
    assert len(hidden) == 1 and list(hidden[0].rglob("model.safetensors"))
    strop_(*words, "20%")
    assert [*tmp_path.iterdir()] == [out] and saved.load(out)
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_help_has_an_example():
    told = strop_("prune", "--help").stdout
    assert "Example: strop prune zoo:svit-digits" in told and "--json" in told
