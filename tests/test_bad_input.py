"""What people get wrong: each mistake ends in one sentence, exit code 2, and nothing written."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import TEXT, save_tiny
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

from strop.cli import app
from strop.core import files
from strop.core.store import ResultStore
from strop.tune import engine


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def tiny(original, tmp_path) -> Path:
    """A sound checkpoint to spoil."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def refused(*words: object) -> str:
    """Run a command line; it must end with exit code 2 and one sentence, which is returned."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("strop: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    assert len(result.stderr) < 600
    return result.stderr


def tune_refused(model: object, out: Path, *words: object) -> str:
    """`tune` must refuse as `refused` says, and leave the place of its results as it was."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    sentence = refused("tune", model, "--out", out, *words)
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else None) == before
    return sentence


# Checkpoints


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def config_is_no_json(model: Path) -> None:
    (model / "config.json").write_text("{")


def config_names_no_type(model: Path) -> None:
    change_config(model, model_type=None)


def config_is_of_another_shape(model: Path) -> None:
    change_config(model, hidden_size=64)


def unknown_type(model: Path) -> None:
    change_config(model, model_type="abacus", architectures=["AbacusForCausalLM"])


def change_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickle_only(model: Path) -> None:
    weights = model / "model.safetensors"
    torch.save(load_file(weights), model / "pytorch_model.bin")
    weights.unlink()


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def truncated(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def truncated_header(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])


def no_safetensors(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"<html>Not found</html>" * 100)


def respoil(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def shape_of_text(model: Path) -> None:
    """A product of sizes that would be a text of gigabytes."""
    change_header(model, ["7", 2**40])


def shape_of_no_numbers(model: Path) -> None:
    change_header(model, [float("nan"), 1])


def change_header(model: Path, shape: list[Any]) -> None:
    weights = model / "model.safetensors"
    raw = weights.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"]["shape"] = shape
    told = json.dumps(header).encode()
    weights.write_bytes(len(told).to_bytes(8, "little") + told + raw[8 + length :])


def more_layers_than_weights(model: Path) -> None:
    change_config(model, num_hidden_layers=10**9)


def classes_of_no_list(model: Path) -> None:
    change_config(model, architectures=7, model_type="bert")


def not_a_number(model: Path) -> None:
    respoil(model, lambda weights: weights["model.layers.1.mlp.up_proj.weight"][3, 3].fill_(torch.nan))


def infinite(model: Path) -> None:
    respoil(model, lambda weights: weights["model.norm.weight"].fill_(torch.inf))


def weight_missing(model: Path) -> None:
    respoil(model, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def shard_missing(model: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (model / "model.safetensors").rename(model / names[0])
    index = {"weight_map": dict(zip(("model.embed_tokens.weight", "model.norm.weight"), names, strict=True))}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


def another_tokenizer(model: Path) -> None:
    """One whose ids go beyond the model's embeddings."""
    save_tiny(model, vocab_size=40)


def encoder(model: Path) -> None:
    config = BertConfig(vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(model)


def encoder_without_a_head(model: Path) -> None:
    encoder(model)
    BertModel(BertConfig.from_pretrained(model)).save_pretrained(model)


def encoder_of_unknown_class(model: Path) -> None:
    encoder_without_a_head(model)
    change_config(model, architectures=None)


def encoder_and_decoder(model: Path) -> None:
    config = T5Config(vocab_size=257, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(model)


def without_keys_and_values(model: Path) -> None:
    """An architecture that carries a state, which no cache of keys and values serves."""
    MambaForCausalLM(MambaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=1)).save_pretrained(model)


CHECKPOINTS = {
    without_keys_and_values: "does not run with the cache that strop hands it",
    shutil.rmtree: "no model folder",
    no_config: "no config.json",
    config_is_no_json: "not valid JSON",
    config_names_no_type: "names no model_type",
    config_is_of_another_shape: "in the file and",
    unknown_type: "not a causal language model",
    pickle_only: "pickled weights only",
    no_weights: "no .safetensors file",
    truncated: "truncated",
    truncated_header: "truncated",
    no_safetensors: "not a safetensors file",
    shape_of_text: "not a safetensors file",
    shape_of_no_numbers: "not a safetensors file",
    more_layers_than_weights: "has 1000000000 layers by config.json",
    classes_of_no_list: "lacks",
    not_a_number: "model.layers.1.mlp.up_proj.weight holds NaN or infinity",
    infinite: "model.norm.weight holds NaN or infinity",
    weight_missing: "lacks 1 of the weights",
    shard_missing: "lacks 1 shard",
    no_tokenizer: "has no tokenizer",
    broken_tokenizer: "cannot load the tokenizer",
    another_tokenizer: "the tokenizer gives token",
    encoder: "not a causal language model",
    encoder_without_a_head: "not a causal language model",
    encoder_of_unknown_class: "lacks",
    encoder_and_decoder: "not a causal language model",
}


@pytest.mark.parametrize("spoil", CHECKPOINTS, ids=lambda spoil: spoil.__name__)
def test_a_checkpoint_that_cannot_be_right_is_refused(tiny, text, tmp_path, spoil):
    spoil(tiny)
    assert CHECKPOINTS[spoil] in refused("generate", tiny, "--prompt", "x")
    assert CHECKPOINTS[spoil] in tune_refused(tiny, tmp_path / "out", "--data", text)


def test_code_that_a_checkpoint_brings_along_is_not_run(tiny, tmp_path):
    mark = tmp_path / "mark"
    for name in ("modeling", "tokenization", "configuration"):
        (tiny / f"{name}_evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    autos = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    change_config(tiny, auto_map=autos)
    path = tiny / "tokenizer_config.json"
    told = {"auto_map": {"AutoTokenizer": [None, "tokenization_evil.Evil"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    result = CliRunner().invoke(app, ["generate", str(tiny), "--prompt", "x", "--max-new-tokens", "1"])
    assert result.exit_code == 0, result.output
    change_config(tiny, model_type="evil", architectures=["EvilForCausalLM"])
    assert "not a causal language model" in refused("generate", tiny, "--prompt", "x")
    assert not mark.exists()


def test_a_model_larger_than_memory_is_refused_before_it_is_loaded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=2000))
    monkeypatch.setattr("strop.core.causal.AutoModelForCausalLM", None)
    for words in (["generate", tiny, "--prompt", "x"], ["tune", tiny, "--out", tmp_path / "out"]):
        sentence = refused(*words)
        assert "GiB for its weights" in sentence
        assert "GiB of memory are free" in sentence


def test_an_unknown_bundled_model_is_refused(tiny, monkeypatch):
    monkeypatch.setenv("STROP_ZOO", str(tiny.parent))
    assert "did you mean 'model'" in refused("generate", "zoo:modle", "--prompt", "x")
    monkeypatch.setenv("STROP_ZOO", str(tiny / "nowhere"))
    assert "set STROP_ZOO" in refused("generate", "zoo:coder", "--prompt", "x")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused(tiny, tmp_path):
    assert "no CUDA device" in refused("generate", tiny, "--prompt", "x", "--device", "cuda")
    assert "no CUDA device" in tune_refused(tiny, tmp_path / "out", "--device", "cuda")


# Data

DATA = {
    "missing": (None, "No such file"),
    "empty": (b"", "is empty"),
    "binary": (b"\0\xff" * 200, "not UTF-8"),
    "NUL": (b"\0" * 400, "binary"),
    "one line": (b"hello", "at least 200"),
    "broken row": (b'{"prompt": "x"}\n{"prompt": \n', "line 2"),
    "no prompt": (b'{"prompt": "x"}\n\n{"text": "y"}\n', "line 3"),
    "messages": (b'{"messages": [{"role": "user", "content": "hello"}]}\n', "chat template"),
    "too few tokens": (b'{"prompt": "x"}\n', "tokens"),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_measured_is_refused(tiny, tmp_path, case):
    content, reason = DATA[case]
    path = tmp_path / "data"
    if content is not None:
        path.write_bytes(content)
    assert reason in tune_refused(tiny, tmp_path / "out", "--data", path)
    assert reason in refused("measure", tiny, "--data", path)


# Recipes

ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(i + 1)}: &{chr(i + 1)} [{', '.join([f'*{chr(i)}'] * 9)}]\n" for i in range(ord("a"), ord("k"))
)
RECIPES = {
    "method": ("strop: 1\nkv: kvran\n", "did you mean 'kvarn'"),
    "slot": ("strop: 1\nweihgts: rtn\n", "did you mean 'weights'"),
    "field": ("strop: 1\nkv: {kvarn: {bits_w: 2}}\n", "did you mean 'bits_"),
    "type of a field": ("strop: 1\nkv: {kvarn: {bits_k: two}}\n", "bits_k must be int"),
    "value of a field": ("strop: 1\nkv: {kvarn: {bits_k: -2}}\n", "kvarn"),
    "two methods": ("strop: 1\nkv: {kvarn: {}, kivi: {}}\n", "holds one node"),
    "no model": ("strop: 1\nkv: kvarn\n", "names no model"),
    "a name beyond what names may be": (f"strop: 1\nmodel: {'x' * 300}\n", "no model folder at x"),
    "no recipe": ("a: 1\n", "starts with `strop: 1`"),
    "later version": ("strop: 2\n", "starts with `strop: 1`"),
    "text": ("hello", "a recipe is a mapping"),
    "nothing": ("", "a recipe is a mapping"),
    "no YAML": ("strop: [1\n", "is not YAML"),
    "code": ("strop: !!python/object/apply:os.system ['true']\n", "is not YAML"),
    "binary": ("strop: \0", "is not YAML"),
    "aliases": (ALIASES + "strop: *k\n", "aliases"),
    "depth": ("strop: 1\nkv: " + "{kvarn: " * 5_000, "is not YAML"),
    "group": ("strop: 1\nkv: {quantized: {group: 0}}\n", "group must be at least 8"),
    "method in a number's place": ("strop: 1\nkv: {kvarn: {tail: {kivi: {}}}}\n", "kvarn.tail must be int"),
    "no field": ("strop: 1\ndecode: {prompt_lookup: {lossless: true}}\n", "no field 'lossless'"),
    "depth of speculation": (
        "strop: 1\nmodel: x\nkv: kvarn\ndecode: {prompt_lookup: {tokens: 200}}\n",
        "can take back 64",
    ),
    "nesting": ("strop: 1\nkv: " + "{kvarn: {bits_k: " * 20 + "1" + "}}" * 20, "bits_k"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_with_a_mistake_is_refused(tmp_path, case):
    content, reason = RECIPES[case]
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    assert reason in refused("generate", path, "--prompt", "x")
    assert reason in refused("measure", path)


def test_a_recipe_that_is_not_there_is_refused(tmp_path):
    assert "cannot read recipe" in refused("generate", tmp_path / "mine.yaml", "--prompt", "x")
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot read recipe" in refused("generate", tmp_path / "folder.yaml", "--prompt", "x")


def test_unknown_methods_are_refused(tiny, tmp_path):
    assert "did you mean 'kvarn'" in tune_refused(tiny, tmp_path / "out", "--methods", "rtn,kvran")
    tune_refused(tiny, tmp_path / "out", "--methods", "")
    tune_refused(tiny, tmp_path / "out", "--methods", ",")


# Options

OPTIONS = [
    *(("--max-drop", text) for text in ("-1%", "100%", "1", "much", "nan", "", "%", "1%%", "inf", "1e9")),
    ("--batch", "0"), ("--batch", "x"), ("--context", "-5"), ("--context", "1"), ("--budget-minutes", "0"),
    ("--budget-minutes", "nan"), ("--budget-minutes", "-1"), ("--objective", "beauty"), ("--device", "tpu"),
    ("--dtype", "fp12"), ("--seed", "-1"), ("--seed", str(2**64)), ("--context", "100000"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value"), OPTIONS, ids=lambda value: value or "empty")
def test_options_out_of_range_are_refused(tiny, text, tmp_path, option, value):
    assert option in tune_refused(tiny, tmp_path / "out", "--data", text, option, value)


GENERATE = {
    "no new tokens": (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
    "no prompt": ([], "--prompt"),
    "two prompts": (["--prompt", "x", "--prompt-file", "x"], "--prompt"),
    "empty": (["--prompt", ""], "prompt is empty"),
    "too long": (["--prompt", "x" * 250], "exceed the model's context of 256"),
    "not UTF-8": (["--prompt", "a\udcff"], "not UTF-8"),
    "missing file": (["--prompt-file", "nowhere.txt"], "No such file"),
    "cold": (["--prompt", "x", "--seed", "1", "--temperature", "0"], "--temperature"),
    "not a temperature": (["--prompt", "x", "--seed", "1", "--temperature", "nan"], "--temperature"),
    "temperature without a seed": (["--prompt", "x", "--temperature", "0.5"], "--seed"),
}


@pytest.mark.parametrize("case", GENERATE)
def test_nothing_to_generate_is_refused(tiny, case):
    words, reason = GENERATE[case]
    assert reason in refused("generate", tiny, *words)


def test_an_unknown_paper_is_refused():
    assert "kvarn" in refused("claims", "kvran")


# Places to write


def test_a_file_in_the_place_of_the_folder_is_refused(tiny, text):
    assert "is a file" in tune_refused(tiny, text, "--data", text)
    assert "is a file" in tune_refused(tiny, text / "below", "--data", text)
    assert text.read_text() == TEXT


def test_a_place_where_nobody_may_write_is_refused(tiny, text):
    assert "cannot write in /proc" in tune_refused(tiny, Path("/proc/nowhere"), "--data", text)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "mkdtemp", full)
    assert "No space left" in tune_refused(tiny, tmp_path / "out", "--data", text)


def test_a_disk_that_fills_up_on_the_way_is_told(tiny, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = ("tune", tiny, "--data", text, "--out", out, "--context", 48, "--methods", "prompt_lookup")
    monkeypatch.setattr(ResultStore, "put", full)
    assert "the disk is full" in refused(*words)
    monkeypatch.undo()
    monkeypatch.setattr(engine, "write_report", full)
    assert "the disk is full" in refused(*words)
    monkeypatch.undo()
    monkeypatch.setattr(files.os, "replace", full)
    assert "No space left" in refused(*words, "--resume")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
