"""lm-evaluation-harness on the command lines: `strop measure --lm-eval` and `python -m strop.harness`."""

import copy
import os
import runpy
import subprocess
import sys
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from harness_tasks import PAGES, TASKS, write_task, write_tasks
from lm_eval.api.registry import get_model
from test_cli import said, save_tiny, strop_

import strop.harness
from strop import tables
from strop.core.errors import StropError
from strop.harness import Suite, main

ROOT = Path(__file__).parents[1]
RUN = """
import functools, runpy
import lm_eval.tasks as tasks

tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)
runpy.run_module("strop.harness", run_name="__main__", alter_sys=True)
"""
"""`python -m strop.harness`, without the minute in which the harness lists its own tasks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_measure_scores_tasks_beside_the_model_as_is(folder, tmp_path, capsys):
    save_tiny(tmp_path / "model", max_position_embeddings=512)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"strop: 1\nmodel: {tmp_path / 'model'}\nweights: {{rtn: {{bits: 2, group: 16}}}}\n")
    data = tmp_path / "text.txt"
    data.write_text("def add(a, b):\n    return a + b\n\n" * 40)
    tasks = f"{folder / 'choosing.yaml'},{folder / 'reading.yaml'}"
    row = said("measure", recipe, "--data", data, "--context", 96, "--lm-eval", tasks)
    scores = {(score["task"], score["metric"]): score for score in row["tasks"]}
    assert list(scores) == [("choosing", "acc"), ("choosing", "acc_norm"), ("reading", "bits_per_byte")]
    assert all(score["samples"] == len(PAGES) for score in scores.values())
    assert all((score["stderr"] is None) == (task == "reading") for (task, _), score in scores.items())
    bits = scores["reading", "bits_per_byte"]
    base = Suite([str(folder / "reading.yaml")])._evaluate("reading", strop.load(tmp_path / "model"), 1)
    assert bits["as_is"] == base["reading", "bits_per_byte", "none"][1] != bits["score"]
    tables.show_row(row)
    told = capsys.readouterr().out
    assert f"{bits['score']:.4g}" in told and f"{bits['as_is']:.4g}" in told and "±" in told


def test_the_harness_command_line_knows_strop(folder, tmp_path):
    save_tiny(tmp_path / "model", max_position_embeddings=512)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"strop: 1\nmodel: {tmp_path / 'model'}\nkv: {{kvarn: {{bits: 2, group: 16}}}}\n")
    words = ["--model", "strop", "--model_args", f"recipe={recipe}", "--batch_size", "4"]
    run = subprocess.run(
        [sys.executable, "-c", RUN, *words, "--tasks", str(folder / "writing.yaml")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "|writing|" in run.stdout and "exact_match" in run.stdout


@pytest.fixture
def few_tasks(folder, monkeypatch):
    """A harness without its own tasks, which take long to list."""
    every = lm_eval.tasks.TaskManager

    def few(include_path=None, include_defaults=True, metadata=None):
        return every(include_path=include_path or folder, include_defaults=False, metadata=metadata)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    monkeypatch.setattr(strop.harness, "TaskManager", few)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [("recipe=zoo:coder,pretrained=x", "recipe"), ("", "zoo:NAME"), ("recipe=zoo:coder,dtype=int3", "bf16")],
)
def test_model_arguments_are_checked(arguments, named):
    with pytest.raises(StropError, match=named):
        get_model("strop").create_from_arg_string(arguments, {"batch_size": 2, "device": None})


def test_model_arguments_come_before_the_lines_defaults(tmp_path):
    place = save_tiny(tmp_path / "model")
    lm = get_model("strop").create_from_arg_string(
        f"recipe={place},device=cpu,dtype=bf16", {"batch_size": 2, "device": "cuda:0"}
    )
    assert (lm.device.type, lm.lm.dtype, lm.batch_size) == ("cpu", torch.bfloat16, 2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tasks", "absent"], "absent"),
        (["--tasks", "choosing"], "zoo:NAME"),
        (["--tasks", "choosing", "--model_args", "size=3"], "'size'"),
    ],
)
def test_mistakes_on_the_harness_line_end_in_one_sentence(words, sentence, few_tasks, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["harness", "--model", "strop", *words])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and told.startswith("strop: ") and sentence in told


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        (None, "", "knows no task 'absent'"),
        ("gone.yaml", None, "is no file"),
        ("empty.yaml", "group_alias: x", "defines no task"),
        ("broken.yaml", "task: [", "is not YAML"),
        (
            "far.yaml",
            "task: far\ndataset_path: json\ndataset_kwargs: {data_files: /no/such.jsonl}",
            "data set",
        ),
        ("hub.yaml", "task: hub\ndataset_path: nobody/no-such-data", "data set"),
    ],
)
def test_tasks_out_of_reach_are_told_before_anything_is_measured(
    file, content, sentence, tmp_path, few_tasks, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if content is not None and file:
        (tmp_path / file).write_text(content)
    task = str(tmp_path / file) if file else "absent"
    told = strop_("measure", "zoo:none", "--lm-eval", task, code=2).stderr
    assert sentence in told and len(told.splitlines()) == 1


def test_tasks_that_run_code_are_left_to_the_harness(folder, tmp_path):
    settings = f"unsafe_code: true, {TASKS['writing']}"
    with pytest.raises(StropError, match="--confirm_run_unsafe_code"):
        Suite([str(write_task(tmp_path, "coding", settings, folder / "documents.jsonl"))])


@pytest.mark.parametrize(
    ("kind", "right", "wrong", "sentence"),
    [
        ("writing", "max_gen_toks: 24", "max_gen_toks: 256", "256"),
        ("writing", "max_gen_toks: 24", "max_gen_toks: 24, warmth: 1", "warmth"),
        ("writing", "doc_to_text: '{{page}}'", "doc_to_text: ''", "IndexError|RuntimeError|Assertion"),
        ("choosing", "doc_to_choice: choices, ", "", "TypeError"),
    ],
)
def test_a_task_that_cannot_run_is_told(kind, right, wrong, sentence, folder, tmp_path):
    lm = strop.load(save_tiny(tmp_path / "model"))
    settings = TASKS[kind].replace(right, wrong)
    suite = Suite([str(write_task(tmp_path, "bad", settings, folder / "documents.jsonl"))])
    with pytest.raises(StropError, match=f"cannot run the task bad .*({sentence})"):
        suite.compare(lm, copy.copy(lm), 1)


def test_without_the_harness_the_extra_is_named(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval" or name == "strop.harness"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("strop.harness", run_name="__main__")
    told = capsys.readouterr().err
    assert end.value.code == 2 and "'strop[lm-eval]'" in told and len(told.splitlines()) == 1
    told = strop_("measure", "zoo:coder", "--lm-eval", "any", code=2).stderr
    assert "'strop[lm-eval]'" in told
