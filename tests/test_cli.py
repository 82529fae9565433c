"""The command line: what each verb passes on, prints and exits with."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from report_study import make_study
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

import strop.claims
from strop import __version__, console, doctor, load
from strop.claims.base import Claim
from strop.cli import app
from strop.core.errors import StropError
from strop.core.files import require_folder
from strop.decode import DDTree
from strop.kv import KVarN
from strop.tune import engine

ROOT = Path(__file__).parents[1]
VERBS = ["tune", "measure", "generate", "claims", "doctor", "train drafter"]
VERBS += ["zoo list", "zoo show", "zoo train"]
TEXT = "def add(a, b):\n    return a + b\n\n" * 40
END = "<end>"


def save_tiny(folder: Path, **changes: Any) -> Path:
    """A two-layer Qwen3 of seeded noise that reads bytes, with 256 tokens of context."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([END, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    shape = {
        "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 256, "eos_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**shape | changes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def strop_(*words: object, code: int = 0) -> Any:
    """Run a command line in this process at 80 columns, and expect an exit code."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output
    wide = [line for line in result.stdout.splitlines() if len(line) > 80 and "/" not in line]
    assert "--json" in words or not wide
    return result


def said(*words: object, code: int = 0) -> Any:
    """The JSON value that a command prints."""
    return json.loads(strop_(*words, "--json", code=code).stdout)


def in_a_process(*words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, "-m", "strop", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


class Recorder:
    """Stands in for a function: keeps what it was called with, and returns or raises what it was given."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.calls: list[tuple] = []

    def __call__(self, *args: Any) -> Any:
        self.calls.append(args)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def tuned(monkeypatch) -> Recorder:
    recorder = Recorder(make_study())
    monkeypatch.setattr(engine, "tune", recorder)
    return recorder


# What every verb shares


def test_whatever_writes_takes_the_same_option():
    def verbs(command):
        return (
            [one for sub in command.commands.values() for one in verbs(sub)]
            if hasattr(command, "commands")
            else [command]
        )

    found = [
        option.opts for verb in verbs(get_command(app)) for option in verb.params if option.name == "out"
    ]
    assert len(found) >= 8 and all(opts == ["--out", "-o"] for opts in found)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb):
    told = strop_(*verb.split(), "--help").stdout
    assert f"Example: strop {verb}" in told
    assert "--json" in told


def test_the_bare_command_and_its_version():
    assert "tune" in strop_().stdout
    assert strop_("--version").stdout == f"strop {__version__}\n"


def test_help_needs_no_tensor_library():
    program = "import sys, strop.cli; sys.exit(bool({'torch', 'transformers', 'plotly'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode
        == 0
    )
    told = in_a_process("--help")
    assert told.returncode == 0
    assert "tune" in told.stdout


ENDINGS = [
    (StropError("a mistake:\nmend it"), 2, "a mistake: mend it"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(28, "No space left on device"), 2, "the disk is full"),
    (PermissionError(13, "Permission denied", "/a/b"), 2, "/a/b: Permission denied"),
    (ModuleNotFoundError("No module named 'x'", name="x"), 2, "package x is not installed"),
    (MemoryError(), 2, "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory"),
]


@pytest.mark.parametrize(("error", "code", "sentence"), ENDINGS, ids=[type(e[0]).__name__ for e in ENDINGS])
def test_whatever_a_user_can_mend_is_one_line(tuned, tmp_path, error, code, sentence):
    tuned.outcome = error
    told = strop_("tune", "zoo:coder", "--out", tmp_path / "out", code=code).stderr
    assert told.startswith("strop: ")
    assert sentence in told
    assert told.count("\n") == 1


OURS = [ZeroDivisionError(), RuntimeError("shapes differ"), ModuleNotFoundError("", name="strop.nowhere")]


@pytest.mark.parametrize("error", OURS, ids=lambda error: type(error).__name__)
def test_mistakes_of_our_own_keep_their_traceback(tuned, tmp_path, error):
    tuned.outcome = error
    result = CliRunner().invoke(app, ["tune", "zoo:coder", "--out", str(tmp_path / "out")])
    assert result.exception is error


def test_a_missing_word_is_told_with_the_place_of_help():
    assert "did you mean" in strop_("tuen", code=2).stderr.lower()
    assert "`strop tune --help`" in strop_("tune", code=2).stderr
    assert "--batch" in strop_("tune", "x", "--bach", "3", code=2).stderr


# tune and measure


def test_tune_passes_everything_on(tuned, tmp_path):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    strop_(
        "tune", "zoo:coder", "--data", text, "--out", out, "--objective", "memory", "--max-drop", "2 %",
        "--batch", 4, "--context", 128, "--budget-minutes", 1.5, "--methods", "kvarn, caddtree",
        "--draft", "ngram", "--device", "cuda", "--dtype", "bf16", "--seed", 3, "--resume",
    )  # fmt: skip
    source, data, folder, settings, resume, _ = tuned.calls[0]
    assert (source, data, folder, resume) == ("zoo:coder", text, out, True)
    assert settings == engine.Settings(
        objective="memory", max_drop=0.02, batch=4, context=128, budget_minutes=1.5,
        methods=("kvarn", "caddtree"), draft="ngram", device="cuda", dtype="bf16", seed=3,
    )  # fmt: skip
    assert not out.exists()


def test_tune_has_defaults(tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    strop_("tune", "some/where/mine")
    _, data, folder, settings, resume, _ = tuned.calls[0]
    assert (data, folder, settings, resume) == (None, Path("runs/mine"), engine.Settings(), False)
    strop_("tune", "zoo:coder")
    assert tuned.calls[1][2] == Path("runs/coder")


@pytest.mark.parametrize(
    ("text", "value"), [("1%", 0.01), ("0.01", 0.01), (" 1 % ", 0.01), ("0", 0), ("99.9%", 0.999)]
)
def test_a_drop_is_a_share_or_a_percentage(text, value):
    assert console.share(text) == pytest.approx(value)


def test_tune_prints_the_frontier_the_choice_and_the_report(tuned, tmp_path):
    told = strop_("tune", "zoo:coder", "--out", tmp_path / "out").stdout
    chosen = tuned.outcome["chosen"]
    assert f"{chosen} keeps the perplexity rise within 1" in " ".join(told.split()).replace("\xa0", " ")
    for words in ("chosen", "on the frontier", "baseline", "report.html", "recipe.yaml", "strop generate"):
        assert words in told
    assert "dominated" not in told
    assert said("tune", "zoo:coder", "--out", tmp_path / "out")["chosen"] == chosen


def test_tune_fails_when_the_model_itself_was_not_measured(tuned, tmp_path):
    tuned.outcome["rows"][0] |= {"status": "failed", "reason": "it broke", "memory": None, "quality": None}
    tuned.outcome["rows"][0] |= {"speed": None, "score": None, "on_frontier": False}
    assert "it broke" in strop_("tune", "zoo:coder", "--out", tmp_path, code=1).stderr


@pytest.fixture
def measured(monkeypatch) -> Recorder:
    recorder = Recorder(next(row for row in make_study()["rows"] if row["chosen"]))
    monkeypatch.setattr(engine, "measure", recorder)
    return recorder


def test_measure_prints_all_there_is(measured):
    told = strop_("measure", "zoo:coder", "--context", 64, "--seed", 2).stdout
    assert measured.outcome["label"] in told
    assert "Perplexity rise" in told
    source, data, settings, *_ = measured.calls[0]
    assert (source, data, settings) == ("zoo:coder", None, engine.Settings(context=64, seed=2))
    assert said("measure", "zoo:coder") == measured.outcome


@pytest.mark.parametrize(("allowed", "code"), [("1%", 0), ("0.0056", 0), ("0.5%", 1), ("0", 1)])
def test_measure_fails_beyond_the_allowed_drop(measured, allowed, code):
    measured.outcome["quality"]["drop_hi"] = 0.0056
    told = strop_("measure", "zoo:coder", "--max-drop", allowed, code=code)
    assert ("above" in told.stderr) == bool(code)


def test_an_unknown_drop_is_no_pass(measured):
    measured.outcome["quality"]["drop_hi"] = float("nan")
    assert said("measure", "zoo:coder", "--max-drop", "1%", code=1)["quality"]["drop_hi"] is None


def test_measure_fails_when_the_recipe_was_refused(measured):
    measured.outcome |= {
        "status": "refused",
        "reason": "no room",
        "quality": None,
        "memory": None,
        "speed": None,
    }
    assert "no room" in strop_("measure", "zoo:coder", code=1).stderr


def test_a_study_of_a_tiny_model_runs_to_its_report(tiny, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "new" / "out"
    words = ("--data", tmp_path / "text.txt", "--context", 48, "--methods", "rtn")
    study = said("tune", tiny, *words, "--out", out)
    assert [row["status"] for row in study["rows"]].count("measured") >= 2
    assert {"recipe.yaml", "report.html"} <= {path.name for path in out.iterdir()}
    assert study["chosen"] in strop_("tune", tiny, *words, "--out", out, "--resume").stdout
    told = strop_("measure", out / "recipe.yaml", *words[:4]).stdout
    assert study["chosen"] in told
    assert "Perplexity rise" in told


# generate


def test_generate_streams_what_the_model_says(tiny):
    plain = load(tiny).generate(["def f("], max_new_tokens=12)[0]
    assert strop_("generate", tiny, "--prompt", "def f(", "--max-new-tokens", 12).stdout == plain + "\n"
    told = said("generate", tiny, "--prompt", "def f(", "--max-new-tokens", 12)
    assert told["text"] == plain
    assert told["tokens"] <= 12
    assert told["recipe"] == {"strop": 1, "model": str(tiny)}
    assert told["seconds"] > 0


def test_generate_draws_the_same_with_the_same_seed(tiny):
    draws = [
        said("generate", tiny, "--prompt", "x", "--seed", seed, "--temperature", 0.8)["text"]
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == load(tiny).generate(["x"], seed=1, temperature=0.8)[0]


def test_generate_runs_a_recipe_on_a_file(tiny, tmp_path):
    (tmp_path / "prompt.txt").write_text("a b a b a b ")
    recipe = load(tiny).with_(kv=KVarN(bits_k=4, bits_v=4)).recipe
    recipe.save(tmp_path / "mine.yaml")
    told = said("generate", tmp_path / "mine.yaml", "--prompt-file", tmp_path / "prompt.txt")
    assert told["prompt"] == "a b a b a b "
    assert told["recipe"] == recipe.to_dict()


def test_a_drafter_changes_nothing_but_the_passes(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    words = ("generate", tiny, "--prompt", "a b a b a b ", "--max-new-tokens", 24)
    plain, heard = said(*words), []
    assert plain["speculation"] is None
    monkeypatch.setattr(console, "progress", lambda: nullcontext(lambda what, share: heard.append(what)))
    for tree in (["--tree", "caddtree"], ["--tree", "ddtree", "--budget", 3], ["--tree", "dflash"], []):
        told = said(*words, "--draft", "ngram", *tree)
        assert told["text"] == plain["text"]
        assert told["recipe"]["decode"].keys() == {tree[1] if tree else "caddtree"}
        assert told["speculation"]["spec_verify_ct"] > 0
    assert told["speculation"]["predicted_tokens_per_s"] > 0
    assert sum("timing the model once, context 1" in what for what in heard) > 1
    heard.clear()
    lines = strop_(*words, "--draft", "ngram").stderr.splitlines()
    assert not any("timing" in what for what in heard), "what rounds cost is known by now"
    assert len(lines) == 2
    assert lines[0].startswith("spec_accept_length ") and "tokens/s" in lines[0]
    assert all(word in lines[1] for word in ("draft ", "build ", "verify ", "commit ", "accepted tokens: 0:"))


def test_statistics_of_several_prompts_are_added_up(tiny):
    lm = load(tiny).with_(decode=DDTree(drafter="ngram", budget=4))
    assert lm.stats is None
    lm.generate(["a b a b ", "c"], max_new_tokens=12)
    together = lm.stats
    alone = []
    for prompt in ("a b a b ", "c"):
        lm.generate([prompt], max_new_tokens=12)
        alone.append(lm.stats)
    assert together.accepted == alone[0].accepted + alone[1].accepted
    assert load(tiny).with_(decode=None).stats is None


# zoo, claims, doctor

SCRIPT = "import sys, strop\nprint('training', *sys.argv[1:])\nsys.exit(int(sys.argv[-1]))\n"


@pytest.fixture
def zoo(tmp_path, monkeypatch) -> Path:
    for name in ("adder", "adverb"):
        save_tiny(tmp_path / name)
    (tmp_path / "adder" / "card.md").write_text("# adder\n\nAdds two numbers.\n\n- seed 0\n")
    (tmp_path / "train_adder.py").write_text(SCRIPT)
    monkeypatch.setenv("STROP_ZOO", str(tmp_path))
    return tmp_path


def test_zoo_lists_and_shows(zoo):
    rows = said("zoo", "list")
    assert [(row["name"], row["about"]) for row in rows] == [
        ("adder", "Adds two numbers."),
        ("adverb", "no card"),
    ]
    assert rows[0]["bytes"] == (zoo / "adder" / "model.safetensors").stat().st_size
    assert "Adds two numbers." in strop_("zoo", "list").stdout
    assert "• seed 0" in strop_("zoo", "show", "adder").stdout
    assert said("zoo", "show", "adder")["card"].startswith("# adder")
    assert "adder" in strop_("zoo", "show", "addre", code=2).stderr


def test_zoo_trains_with_the_script_and_passes_its_exit_code_on(zoo):
    told = in_a_process("zoo", "train", "adder", "--out", "x", "3")
    assert (told.returncode, told.stdout) == (3, "training --out x 3\n")
    told = in_a_process("zoo", "train", "adder", "--json", "0")
    assert json.loads(told.stdout)["exit_code"] == 0
    assert told.stderr == "training 0\n"
    assert "did you mean 'adder'" in strop_("zoo", "train", "../adder", code=2).stderr
    (zoo / "train_adder_up.py").write_text(SCRIPT)
    assert said("zoo", "train", "adder-up", "0")["exit_code"] == 0


CLAIM = Claim(
    paper="kvarn", claim="Two bits lose less than HQQ", paper_value="0.4 points", measured="1.2 points",
    interval=(0.9, 1.5), seeds=3, varied="data", verdict="partly", reason="holds on sums only", scale="cpu",
    seconds=3.0,
)  # fmt: skip


def test_claims_prints_verdicts_and_never_fails(monkeypatch):
    recorder = Recorder([CLAIM])
    monkeypatch.setattr(strop.claims, "run_claims", recorder, raising=False)
    told = strop_("claims", "kvarn", "--scale", "gpu").stdout
    assert list(recorder.calls[0][0]) == ["kvarn"]
    assert recorder.calls[0][1] == "gpu"
    for words in ("0.4 points", "1.2 points", "0.9 to 1.5", "partly", "holds on sums only"):
        assert words in told
    assert said("claims")[0]["interval"] == [0.9, 1.5]
    assert list(recorder.calls[1][0]) == []


def test_doctor_says_what_is_here_and_what_brings_the_rest(monkeypatch):
    told = said("doctor")
    names = {part["name"]: part for part in told["parts"]}
    assert told["healthy"]
    assert names["torch"]["found"] == torch.__version__
    assert {"vllm", "ray", "numba", "gpu", "chromium", "zoo", "disk"} <= set(names)
    monkeypatch.setattr(doctor, "PACKAGES", {"nowhere": (False, "testing", "pip install nowhere")})
    assert "pip install nowhere" in strop_("doctor").stdout
    monkeypatch.setattr(doctor, "PACKAGES", {"nowhere": (True, "testing", "pip install nowhere")})
    assert "MISSING" in strop_("doctor", code=1).stdout


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    require_folder(tmp_path / "a" / "b")
    require_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
