"""The main job on tiny checkpoints: what is tried, refused, chosen, kept and resumed."""

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from counts import SOAK
from test_cli import TEXT, save_tiny
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
)

from strop import recipe
from strop.audit import speed
from strop.core.checkpoint import inspect, require_memory
from strop.core.errors import StropError
from strop.core.store import ResultStore
from strop.kv import KVarN
from strop.model import load
from strop.recipe import Recipe
from strop.tasks.data import Data, Row, read_data
from strop.tune import engine, measure, workload
from strop.tune.engine import Settings, tune
from strop.tune.frontier import dominates, judge, step_ratio
from strop.weights import RTN

SHAPE = {
    "vocab_size": 257,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 640,
    "eos_token_id": 0,
    "bos_token_id": None,
}
EXPERTS = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4}
GPT2 = {"vocab_size": 257, "n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 640, "eos_token_id": 0}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SHAPE),
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "gpt2": GPT2Config(**GPT2),
    "qwen2_moe": Qwen2MoeConfig(**SHAPE, **EXPERTS, num_experts_per_tok=2),
}


def save_checkpoint(folder: Path, architecture: str) -> Path:
    """Seeded noise of an architecture, as transformers itself saves it, reading bytes."""
    save_tiny(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Less of everything: what is tested here is the path, not the numbers."""
    monkeypatch.setattr(workload, "SCORED_TOKENS", 600)
    monkeypatch.setattr(workload, "CONTINUATION", 8)
    monkeypatch.setattr(workload, "KEYS_PER_DEPTH", 1)
    monkeypatch.setattr(measure, "CONTINUATION", 8)
    monkeypatch.setattr(speed, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(speed, "SECONDS", 0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tune") / "model", "qwen3")


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 4)
    return path


def rows_of(study: dict) -> dict[str, dict]:
    return {row["label"]: row for row in study["rows"]}


def row(label: str, memory: float, step: float, drop: float) -> dict:
    return {
        "label": label,
        "status": "measured",
        "memory": {"ratio": memory},
        "speed": {"step_ratio": [step, step, step]},
        "quality": {"drop_hi": drop},
    }


def test_judge_prefers_the_objective_among_what_keeps_the_drop():
    rows = [row("as is", 1, 1, 0), row("small", 0.4, 1.5, 0.005), row("lossy", 0.1, 0.5, 0.2)]
    assert judge(rows, "memory", 0.01)["label"] == "small"
    assert judge(rows, "speed", 0.01)["label"] == "as is"
    assert judge(rows, "balanced", 0.01)["label"] == "small"
    assert judge(rows, "balanced", 0.5)["label"] == "lossy"
    assert [r["chosen"] for r in rows] == [False, False, True]


def test_judge_names_what_dominates():
    rows = [row("as is", 1, 1, 0), row("good", 0.5, 0.9, 0.001), row("bad", 0.6, 0.95, 0.002)]
    judge(rows, "memory", 0.01)
    assert rows[2]["dominated_by"] == "good" and not rows[2]["on_frontier"]
    assert rows[0]["dominated_by"] is None and rows[0]["on_frontier"], "less drop is worth something"
    assert not dominates(rows[0], rows[0])


def test_noise_neither_chooses_nor_dominates():
    rows = [row("as is", 1, 1.03, 0), row("noisy", 1, 0.97, 0), row("fast", 1, 0.8, 0.001)]
    rows[1]["speed"]["step_ratio"] = [0.97, 0.9, 1.05]
    wide = row("wide", 1, 1.3, 0)
    wide["speed"]["step_ratio"] = [1.3, 0.95, 1.6]
    assert step_ratio(wide) == 1.3 and step_ratio(rows[1]) == 1 == step_ratio(rows[0])
    assert judge(rows[:2], "speed", 0.01)["label"] == "as is"
    assert rows[0]["dominated_by"] is None and rows[1]["dominated_by"] is None
    assert judge(rows, "speed", 0.01)["label"] == "fast"


def test_study_writes_all_that_it_promises(model, text, tmp_path):
    out = tmp_path / "out"
    study = tune(
        str(model), text, out, Settings(methods=("kvarn", "quantized", "prompt_lookup"), max_drop=0.9)
    )
    rows = rows_of(study)
    assert rows["as is"]["quality"]["ppl_rise"] == 0 and rows["as is"]["quality"]["kl"] == 0
    assert rows["as is"]["memory"]["ratio"] == 1
    assert {"kvarn k4v4", "kvarn", "kvarn k2v2", "prompt_lookup"} & set(rows)
    for measured in study["rows"]:
        assert measured["status"] in ("measured", "refused"), measured["reason"]
    assert (out / "report.html").stat().st_size > 1_000_000
    assert Recipe.load(out / "recipe.yaml").to_dict() == rows[study["chosen"]]["recipe"]
    kept = sqlite3.connect(out / "results.sqlite").execute("SELECT label, status FROM results").fetchall()
    assert {label for label, _ in kept} == set(rows)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_checkpoints_that_strop_did_not_make(architecture, text, tmp_path, monkeypatch):
    few = {"weights": (RTN(bits=8),), "kv": (KVarN(bits_k=2, bits_v=2),), "decode": ()}
    monkeypatch.setattr(recipe, "ALWAYS", few)
    folder = save_checkpoint(tmp_path / "model", architecture)
    study = tune(str(folder), text, tmp_path / "out", Settings(methods=("kvarn", "rtn"), max_drop=0.9))
    rows = rows_of(study)
    assert rows["kvarn k2v2"]["status"] == "measured", rows["kvarn k2v2"]["reason"]
    assert rows["rtn int8"]["memory"]["ratio"] < 1


def test_composition_that_cannot_work_is_listed_with_its_reason(model, text, tmp_path):
    settings = Settings(methods=("quantized", "prompt_lookup"), max_drop=0.99)
    rows = rows_of(tune(str(model), text, tmp_path / "out", settings))
    refused = [r for label, r in rows.items() if "prompt_lookup" in label and "quantized" in label]
    assert refused and all(r["status"] == "refused" and "take back" in r["reason"] for r in refused)


def test_speculation_in_a_batch_is_refused_with_its_reason(model, text, tmp_path):
    settings = Settings(methods=("prompt_lookup",), batch=2)
    rows = rows_of(tune(str(model), text, tmp_path / "out", settings))
    assert rows["prompt_lookup"]["status"] == "refused" and "--batch 1" in rows["prompt_lookup"]["reason"]
    assert rows["as is"]["memory"]["batch"] == 2


def test_resume_measures_nothing_twice_and_changed_data_is_new(model, text, tmp_path):
    settings, out = Settings(methods=("rtn",)), tmp_path / "out"
    first = tune(str(model), text, out, settings)
    again = tune(str(model), text, out, settings, resume=True)
    assert all(r.pop("reused") for r in again["rows"])
    assert [r["speed"] for r in again["rows"]] == [r["speed"] for r in first["rows"]]
    text.write_text(TEXT * 5)
    other = tune(str(model), text, out, settings, resume=True)
    assert not any("reused" in r for r in other["rows"])


def test_resume_tries_again_what_was_refused(model, text, tmp_path, monkeypatch):
    settings, out = Settings(methods=("kvarn",)), tmp_path / "out"

    def missing(self, config):
        raise StropError("a package is missing")

    with monkeypatch.context() as patched:
        patched.setattr(KVarN, "new_cache", missing)
        first = rows_of(tune(str(model), text, out, settings))
    assert first["kvarn k4v4"]["status"] == "refused"
    again = rows_of(tune(str(model), text, out, settings, resume=True))
    assert again["kvarn k4v4"]["status"] == "measured" and again["as is"]["reused"]


@pytest.mark.parametrize("change", ["tokenizer_config.json", "model.safetensors", "chat_template.jinja"])
def test_fingerprint_follows_all_that_decides_what_is_written(change, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    before = inspect(folder).fingerprint()
    assert before == inspect(model).fingerprint()
    held = (folder / change).read_bytes() if (folder / change).exists() else b"{}"
    (folder / change).write_bytes(held[:-9] + bytes([held[-9] ^ 1]) + held[-8:] if len(held) > 9 else held)
    assert inspect(folder).fingerprint() != before


def test_weights_in_another_form_beside_the_shards_do_not_count(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert inspect(folder).bytes == inspect(model).bytes


def test_memory_is_asked_for_at_the_wanted_size(model):
    checkpoint = inspect(model)
    require_memory(checkpoint, 2, available=2 * checkpoint.elements)
    with pytest.raises(StropError, match="--dtype bf16"):
        require_memory(checkpoint, 4, available=2 * checkpoint.elements)
    with pytest.raises(StropError, match=r"use a larger machine$"):
        require_memory(checkpoint, 2, available=checkpoint.elements)


def test_a_named_method_is_tried_even_when_it_is_no_candidate(model, text, tmp_path):
    rows = rows_of(tune(str(model), text, tmp_path / "out", Settings(methods=("kivi",))))
    assert rows["kivi k4v2"]["status"] == "measured"


def test_a_folder_that_no_study_wrote_is_left_alone(model, text, tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "notes.txt").write_text("mine")
    settings = Settings(methods=("rtn",), max_drop=0.9, objective="memory")
    study = tune(str(model), text, tmp_path / "out", settings)
    assert "rtn" in study["chosen"] and (checkpoint / "notes.txt").read_text() == "mine"
    assert any("was not written by a study" in entry["why"] for entry in study["not_measured"])
    shutil.rmtree(checkpoint)
    for _ in range(2):
        study = tune(str(model), text, tmp_path / "out", settings, resume=True)
        assert Recipe.load(checkpoint / "strop.yaml").to_dict()["weights"] and "vllm" in study["commands"][2]
    assert not list((tmp_path / "out").glob(".*"))
    tune(str(checkpoint), text, tmp_path / "out", Settings(methods=("prompt_lookup",)))
    assert [*checkpoint.glob("*.safetensors")], "it was the model itself"
    study = tune(str(model), text, tmp_path / "out", Settings(methods=("prompt_lookup",), objective="speed"))
    assert "rtn" not in study["chosen"] and not checkpoint.exists(), "it belonged to another recipe"


def test_the_commands_repeat_the_study(model, text, tmp_path):
    settings = Settings(methods=("rtn",), context=120, dtype="fp32", seed=3)
    study = tune(str(model), text, tmp_path / "out", settings)
    generate, measuring = study["commands"][:2]
    assert "--dtype fp32" in generate and "--context" not in generate
    for words in (f"--data {text}", "--context 120", "--dtype fp32", "--seed 3"):
        assert words in measuring and words in study["settings"]["command"]


def test_quality_is_measured_at_the_stated_context(model, tmp_path):
    file = tmp_path / "short.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": TEXT[i : i + 60]}) for i in range(9)))
    base, data = load(str(model)), read_data(file)
    work = workload.build(base, data, 500, 1, 0)
    assert [len(ids) for ids in work.texts] == [500, 40]
    assert max(len(ids) for ids in workload.build(base, data, None, 1, 0).texts) <= 60
    with pytest.raises(StropError, match="holds 540 tokens in all"):
        workload.build(base, data, 560, 1, 0)


def test_a_long_text_is_sampled(model, monkeypatch):
    monkeypatch.setattr(workload, "PIECE", 500)
    monkeypatch.setattr(workload, "SAMPLED", 3)
    monkeypatch.setattr(workload, "LONGEST", 100)
    rows = [Row(TEXT * 20), Row(TEXT[:900])]
    pieces = workload._sample(rows, seed=0)
    assert len(pieces) == 3 and all(piece.prompt in TEXT * 20 for piece in pieces)
    work = workload.build(load(str(model)), Data("t", tuple(rows), "text", "f"), None, 1, 0)
    assert work.context == 100


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("72", True),
        ("72\nSo", True),
        ("3 * 24 = 72.\n", True),
        ("is 172", False),
        ("72 or 73", False),
        ("x = 3.72", False),
        ("so it is -72", False),
        ("total 1,72.", False),
        ("1/72", False),
        ("x=72", True),
    ],
)
def test_an_answer_may_stand_at_the_end(completion, right):
    assert workload.answered(str.strip, "72", completion) is right


def test_spent_budget_skips_and_says_so(model, text, tmp_path):
    study = tune(str(model), text, tmp_path / "out", Settings(methods=("rtn",), budget_minutes=1e-9))
    rows = rows_of(study)
    assert rows["as is"]["status"] == "measured"
    assert rows["rtn int8"]["status"] == "skipped" and "budget" in rows["rtn int8"]["reason"]
    assert study["chosen"] == "as is"


def test_problems_with_answers_count(model, tmp_path):
    file = tmp_path / "tasks.jsonl"
    lines = [{"prompt": TEXT[: 300 + i], "answer": str(i)} for i in range(4)]
    file.write_text("\n".join(map(json.dumps, lines)))
    study = tune(str(model), file, tmp_path / "out", Settings(methods=("rtn",)))
    assert any("solves 0 of 4" in entry["why"] for entry in study["not_measured"])
    rows = rows_of(study)
    assert rows["as is"]["quality"]["exact_match"] == 0
    assert rows["as is"]["quality"]["exact_match_loss"] is None, "nothing was there to lose"


def test_unknown_method_is_refused():
    with pytest.raises(StropError, match="did you mean 'kvarn'"):
        Settings(methods=("kvarm",))


def command(model: Path, text: Path, out: Path) -> list[str]:
    words = ["tune", str(model), "--data", str(text), "--out", str(out), "--methods", "rtn"]
    return [sys.executable, "-m", "strop", *words, "--context", "120", "--resume", "--json"]


def measured_rows(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        return []
    try:
        return sqlite3.connect(path).execute("SELECT key, row FROM results ORDER BY key").fetchall()
    except sqlite3.OperationalError:
        return []


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="long, and a kill of robustness/test_kill.py in brief: make soak")
def test_kill_loses_nothing_that_was_complete(model, text, tmp_path):
    out = tmp_path / "out"
    run = subprocess.Popen(command(model, text, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(measured_rows(out / "results.sqlite")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    before = dict(measured_rows(out / "results.sqlite"))
    assert len(before) >= 2
    assert not (out / "report.html").exists()
    again = subprocess.run(command(model, text, out), capture_output=True, text=True, check=True)
    after = dict(measured_rows(out / "results.sqlite"))
    assert before.items() <= after.items(), "a complete row changed"
    assert sum("reused" in r for r in json.loads(again.stdout)["rows"]) == len(before)
    assert (out / "report.html").exists()


def put_many(path: Path, start: int) -> None:
    store = ResultStore(path)
    names = {
        "model": "m",
        "model_fingerprint": "f",
        "recipe": {},
        "data_fingerprint": "d",
        "seed": 0,
        "code": "c",
    }
    for index in range(start, start + 50):
        store.put(f"{index % 70}", names, {"label": str(index), "status": "measured"})
    store.close()


def test_two_writers_share_a_file(tmp_path):
    path = tmp_path / "results.sqlite"
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=put_many, args=(path, start)) for start in (0, 40)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert connection.execute("SELECT count(*) FROM results").fetchone() == (70,)


def test_a_table_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "results.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE results (key TEXT)")
    with pytest.raises(StropError, match="no such column"):
        ResultStore(path)


def test_many_open_a_new_file_at_once(tmp_path):
    for number in range(5):
        path = tmp_path / str(number)
        code = f"import pathlib, strop.core.store as s; s.ResultStore(pathlib.Path({str(path)!r}))"
        runs = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(4)]
        assert [run.wait() for run in runs] == [0] * 4, [run.stderr.read() for run in runs]


def test_code_version_follows_the_code(monkeypatch):
    from strop.core import machine

    before = machine.code_version()
    machine.code_version.cache_clear()
    monkeypatch.setattr(machine, "UNMEASURED", (*machine.UNMEASURED, "model.py"))
    assert machine.code_version() != before
    machine.code_version.cache_clear()


def test_out_must_be_a_folder(model, text, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StropError, match="it is a file"):
        tune(str(model), text, tmp_path / "file", Settings())
    assert engine.Settings().objective == "balanced"
