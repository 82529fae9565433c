"""`strop quantize` and `strop recipe`: what they write and print, and how they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from quantizing import build, save, store, tensors_of
from typer.testing import CliRunner

from strop import load
from strop.cli import app
from strop.recipe import Recipe
from strop.weights import GPTQ, HQQ, PMQ, RTN, AlphaQ

TOOLS = ["vllm", "llm-compressor", "gptqmodel", "torchao", "modelopt", "hqq", "autoround"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save(build("qwen3", torch.bfloat16), tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A mixture of experts in shards."""
    folder = tmp_path_factory.mktemp("mixed") / "model"
    return save(build("mixtral", torch.bfloat16), folder, "200KB")


def strop_(*words: object, code: int = 0) -> Any:
    """Run a command line in this process at 80 columns, and expect an exit code."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output
    wide = [line for line in result.stdout.splitlines() if len(line) > 80 and "/" not in line]
    assert "--json" in words or not wide, wide
    return result


def said(*words: object) -> Any:
    """The JSON value that a command prints."""
    return json.loads(strop_(*words, "--json").stdout)


def refused(*words: object) -> str:
    """The one sentence by which a command refuses."""
    result = strop_(*words, code=2)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("strop: ") and not result.stdout
    return lines[0]


def copied(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    return out


@pytest.mark.parametrize("verb", ["quantize", "recipe"])
def test_help_has_an_example(verb):
    told = strop_(verb, "--help").stdout
    assert f"Example: strop {verb}" in told and "--json" in told


def test_quantize_writes_what_it_says(dense, tmp_path):
    out = tmp_path / "out"
    told = said("quantize", dense, "--bits", 4, "--group", 32, "-o", out)
    assert told["method"] == "rtn int4 group=32"
    assert told["engines"] == ["strop", "transformers", "vLLM"]
    assert told["bytes"] == sum(tensor.nbytes for tensor in tensors_of(out).values())
    assert told["effective_bits"] == 4 + 16 / 32 and told["average_bits"] == 4
    assert told["expert_average_bits"] is None
    assert len(told["matrices"]) == 2 * 7
    assert all(0 < matrix["measured"] < 0.05 for matrix in told["matrices"])
    assert len((out / "matrices.csv").read_text().splitlines()) == 1 + 2 * 7
    assert Recipe.load(out / "strop.yaml") == Recipe(model=str(dense), weights=RTN(bits=4, group=32))
    assert load(out).model.model.layers[0].mlp.up_proj.grid.bits == 4
    written = strop_("generate", out, "--prompt", "to be", "--max-new-tokens", 2)
    assert written.exit_code == 0


def test_a_mixture_gets_alphaq_and_people_get_a_table(mixed, tmp_path):
    result = strop_("quantize", mixed, "--group", 32, "-o", tmp_path / "out").stdout
    words = " ".join(result.split())
    assert "alphaq 3.5 bits by rtn int4 group=32 asymmetric" in words
    assert "No spectral signal" in words and "Read by strop." in words
    assert "expert down_proj" in words and "8 x 64x96" in words
    assert "matrices.csv" in words and f"strop generate {tmp_path / 'out'}" in result
    assert load(tmp_path / "out").recipe.weights is None


def test_dry_run_writes_nothing_and_says_the_same_plan(mixed, tmp_path):
    words = ["quantize", mixed, "--bits", 2.5, "--group", 32, "--gamma", 3]
    told = said(*words, "-o", tmp_path / "out", "--dry-run")
    assert not [*tmp_path.iterdir()]
    assert "out" not in told and "bytes" not in told
    done = said(*words, "-o", tmp_path / "out")
    assert told["expert_average_bits"] == done["expert_average_bits"] <= 2.5
    assert [row["bits"] for row in told["matrices"]] == [row["bits"] for row in done["matrices"]]
    assert "with scales and zeros" in " ".join(strop_(*words, "--dry-run").stdout.split())


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ("", AlphaQ()),
        ("--method rtn", RTN(bits=4, group=128)),
        ("--method gptq --bits 3 --group 0 --asymmetric", GPTQ(bits=3, group=None, symmetric=False)),
        ("--method hqq", HQQ(group=128)),
        ("--method gptq --calibration t.txt", GPTQ(calibration="t.txt")),
        ("--widths 4,2 --bits 3 --granularity layer",
         AlphaQ(bits=3.0, widths=(2, 4), granularity="layer", quantizer=RTN(bits=4, group=128))),
        ("--bits 5 --granularity layer",
         AlphaQ(bits=5.0, widths=(4, 8), granularity="layer", quantizer=RTN(bits=4, group=128))),
        ("--granularity layer", AlphaQ(granularity="layer", quantizer=RTN(bits=4, group=128))),
        ("--method pmq --calibration t.txt", PMQ(calibration="t.txt")),
        ("--method pmq --by gptq --calibration t.txt",
         PMQ(calibration="t.txt", quantizer=GPTQ(symmetric=False))),
        ("--by gptq --calibration t.txt", AlphaQ(quantizer=GPTQ(symmetric=False, calibration="t.txt"))),
        ("--by gptq --gamma 0", AlphaQ(gamma=0.0, quantizer=GPTQ(symmetric=False))),
        ("--by hqq --symmetric", None),
    ],
)  # fmt: skip
def test_options_mean_a_recipe(words, method, mixed, monkeypatch, tmp_path):
    seen = []

    def preview(recipe, report):
        seen.append(recipe)
        raise SystemExit(0)

    monkeypatch.setattr("strop.quantize.preview", preview)
    if method is None:
        assert "hqq has asymmetric grids" in refused("quantize", mixed, *words.split(), "--dry-run")
        return
    strop_("quantize", mixed, *words.split(), "--dry-run")
    assert seen == [Recipe(model=str(mixed), weights=method)]
    seen[0].save(tmp_path / "recipe.yaml")
    strop_("quantize", tmp_path / "recipe.yaml", "--dry-run")
    assert seen[1].weights == method
    refusal = refused("quantize", tmp_path / "recipe.yaml", "--bits", 4, "--dry-run")
    assert "leave --method and its settings out" in refusal


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("", "add -o DIR, or --dry-run"),
        ("-o {model}", "is the model's own folder"),
        ("-o {model}/inside", "is the model's own folder"),
        ("-o {taken}", "exists already"),
        ("-o {out} --bits 3.5 --method rtn", "whole bits, got 3.5"),
        ("-o {out} --bits 9", "bits must be 1 to 8"),
        ("-o {out} --bits 0", "not a number above 0"),
        ("-o {out} --method alphaq", "Qwen3ForCausalLM has none: use rtn"),
        ("-o {out} --method alphaq --bits 1.5", "below the smallest width of 2"),
        ("-o {out} --method alphaq --bits 5", "above the largest width of 4"),
        ("-o {out} --method alphaq --by hqq --bits 3 --widths 2,7", "hqq has asymmetric grids"),
        ("-o {out} --method rtn --calibration t.txt", "rtn looks at no text"),
        ("-o {out} --method alphaq --calibration t.txt", "alphaq by rtn looks at no text"),
        ("-o {out} --method awq", "awq"),
        ("-o {out} --group 48", "not a multiple of group=48"),
        ("-o {out} --method rtn --by gptq", "leave --by out"),
        ("-o {out} --method rtn --widths 2,3", "no field 'widths'"),
        ("-o {out} --method rtn --gamma 3", "no field 'gamma'"),
        ("-o {out} --method alphaq --widths two", "not a list of whole numbers"),
        ("-o {out} --method gptq --group 32 --calibration {out}/none.txt", "none.txt"),
        ("-o {taken}/file/out --group 32", "cannot write in"),
    ],
)
def test_what_cannot_work_ends_in_one_sentence(words, why, dense, tmp_path):
    out, taken = tmp_path / "out", tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("precious")
    before = {path: path.stat().st_mtime_ns for path in dense.rglob("*")}
    spelled = words.format(model=dense, out=out, taken=taken).split()
    assert why in refused("quantize", dense, *spelled)
    assert {path.name for path in tmp_path.rglob("*")} == {"taken", "file"}
    assert {path: path.stat().st_mtime_ns for path in dense.rglob("*")} == before


def break_(kind: str, folder: Path) -> Path:
    shard = sorted(folder.glob("*.safetensors"))[0]
    if kind == "shard missing":
        shard.unlink()
    elif kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "not finite":
        tensors = tensors_of(folder)
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
        store(folder, tensors)
    elif kind == "weight missing":
        tensors = tensors_of(folder)
        del tensors["model.layers.1.mlp.down_proj.weight"]
        store(folder, tensors)
    elif kind == "other shape":
        tensors = tensors_of(folder)
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.ones(64, 32, dtype=torch.bfloat16)
        store(folder, tensors)
    return folder


@pytest.mark.parametrize(
    ("kind", "source", "why"),
    [
        ("shard missing", "mixed", "lacks 1 shard"),
        ("truncated", "mixed", "is truncated"),
        ("truncated", "dense", "is truncated"),
        ("no config", "dense", "has no config.json"),
        ("weight missing", "dense", "stores no weight model.layers.1.mlp.down_proj.weight"),
        ("not finite", "dense", "model.layers.1.mlp.down_proj.weight holds NaN"),
        ("other shape", "dense", "model.layers.1.mlp.down_proj"),
    ],
)
def test_a_broken_checkpoint_ends_in_one_sentence(kind, source, why, request, tmp_path):
    folder = break_(kind, copied(request.getfixturevalue(source), tmp_path / "model"))
    assert why in refused("quantize", folder, "--method", "rtn", "--group", 32, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantized_checkpoint_is_refused(dense, tmp_path):
    for bits in (4, 1):
        out = tmp_path / f"int{bits}"
        strop_("quantize", dense, "--bits", bits, "--group", 32, "-o", out)
        for words in (["-o", tmp_path / "again"], ["--dry-run"]):
            assert "already quantized" in refused("quantize", out, *words)
    assert not (tmp_path / "again").exists()


def test_gptq_reads_calibration_text(dense, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 40)
    recipe = Recipe(model=str(dense), weights=GPTQ(group=32, samples=4, length=64, calibration=str(text)))
    recipe.save(tmp_path / "recipe.yaml")
    told = said("quantize", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert told["method"].startswith("gptq") and (tmp_path / "out" / "plan.yaml").is_file()
    text.write_text("too short " * 25)
    recipe = Recipe(model=str(dense), weights=GPTQ(group=32, length=256, calibration=str(text)))
    recipe.save(tmp_path / "recipe.yaml")
    assert "fewer than one row of 256" in refused(
        "quantize", tmp_path / "recipe.yaml", "-o", tmp_path / "new"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "text.txt", "out"}


@pytest.mark.parametrize("tool", TOOLS)
def test_recipe_speaks_to_each_tool(tool, dense, tmp_path):
    out = tmp_path / "out"
    strop_("quantize", dense, "--bits", 4, "--group", 32, "-o", out)
    told = said("recipe", out, "--to", tool)
    assert set(told) == {"tool", "text", "told", "warning"} and told["tool"] == tool
    text = CliRunner().invoke(app, ["recipe", str(out), "--to", tool]).stdout
    assert text.rstrip("\n") == told["text"]
    strop_("recipe", out, "--to", tool, "-o", tmp_path / "rules")
    assert (tmp_path / "rules").read_text().rstrip("\n") == told["text"]
    if tool == "vllm":
        assert told["told"][:3] == ["vllm", "serve", str(out)]
    elif tool == "llm-compressor":
        assert yaml.safe_load(told["text"])["default_stage"]
    elif tool == "modelopt":
        cfg = yaml.safe_load(told["text"])["quant_cfg"][1]["cfg"]
        assert cfg == {"num_bits": 4, "block_sizes": {-1: 32}}
    else:
        assert json.loads(told["text"]) == told["told"]


def test_recipe_plans_a_recipe_that_nobody_carried_out(mixed, tmp_path):
    method = AlphaQ(bits=2.5, gamma=3.0, quantizer=RTN(bits=4, group=32))
    Recipe(model=str(mixed), weights=method).save(tmp_path / "recipe.yaml")
    result = CliRunner().invoke(app, ["recipe", str(tmp_path / "recipe.yaml"), "--to", "torchao"])
    assert result.exit_code == 0 and json.loads(result.stdout)["_type"] == "FqnToConfig"
    assert "engines that fuse matrices cannot serve this plan" in result.stderr
    assert "strop quantize" in refused("recipe", tmp_path / "recipe.yaml", "--to", "vllm")
    Recipe(model=str(mixed)).save(tmp_path / "empty.yaml")
    assert "no weights method" in refused("recipe", tmp_path / "empty.yaml", "--to", "torchao")
    for source, tools in ((mixed, TOOLS[1:]), ("zoo:coder", TOOLS)):
        for tool in tools:
            why = refused("recipe", source, "--to", tool)
            assert "give a recipe file, or a folder that `strop quantize` wrote" in why
    assert strop_("recipe", mixed, "--to", "vllm").stdout == f"vllm serve {mixed}\n"
    assert "cannot read recipe" in refused("recipe", tmp_path / "none.yaml", "--to", "torchao")
    assert "--to" in refused("recipe", tmp_path / "recipe.yaml", "--to", "gguf")


def test_vllm_is_told_no_folder_that_it_does_not_read(dense, tmp_path):
    told = said("quantize", dense, "--bits", 3, "--group", 32, "-o", tmp_path / "out")
    assert "vLLM" not in told["engines"]
    assert "no kernel for 3 bits" in refused("recipe", tmp_path / "out", "--to", "vllm")
    shown = " ".join(strop_("quantize", dense, "--bits", 3, "--group", 32, "--dry-run").stdout.split())
    assert f"Read by strop, transformers. {told['notes'][0]}." in shown and "VLLM" not in shown
