"""Whole command lines with something changed: a promised exit code, no traceback, no stray file."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path, PurePath
from random import Random
from typing import Any

import pytest
import yaml
from counts import SEED, count, draws

from robustness.jobs import listed
from robustness.mutate import damaged, scribbled, spoiled

RECIPE = {"strop": 1, "model": "{model}", "weights": {"rtn": {"bits": 8}}, "kv": {"kvarn": {"bits_k": 4}}}
LINES = (
    "tune {model} --data {data} --out {out} --context 48 --methods prompt_lookup --max-drop 1%",
    "tune {model} --data {rows} --out {out} --batch 2 --methods rtn --objective memory --seed 3 --json",
    "measure {recipe} --data {data} --context 48 --max-drop 5%",
    "generate {model} --prompt abc --max-new-tokens 3 --seed 1 --temperature 0.5",
    "generate {recipe} --prompt-file {data} --max-new-tokens 3 --json",
    "generate {model} --prompt abc --draft ngram --tree ddtree --budget 4 --max-new-tokens 3",
    "quantize {model} --method rtn --bits 4 --group 32 -o {out}",
    "quantize {recipe} -o {out} --resume",
    "quantize {model} --method gptq --group 32 --calibration {data} -o {out} --json",
    "quantize {model} --method alphaq --bits 3.5 --widths 2,3,4 --granularity matrix --gamma 1 --dry-run",
    "recipe {recipe} --to vllm",
    "recipe {recipe} --to llm-compressor -o {out}",
    "train drafter --target {model} --data {data} --out {out} --tokens 64 --steps 1 --layers 1 --block 4",
    "zoo show coder --json",
    "zoo list",
    "claims nothing --scale cpu",
    "doctor --json",
)
VALUES = (
    "", " ", "-", "--", "-1", "0", "1", "2", "7", "32", "99999999999999999999", "1e400", "nan", "inf", "-inf",
    "0x10", "1%", "100%", "x" * 300, "a/" * 2000, "\N{BOMB}", "a\nb", "--json", "--help", "--resume",
    "--seed", "zoo:coder\x1b[31m", "zoo:", "zoo:../x", "zoo:/etc", "cuda", "fp32", "rtn", "2,2", "2,99", ",",
    "ngram", "{data}", "{recipe}", "{out}", "{rows}", ".", "..", "~/x", "../inputs/data.txt",
)  # fmt: skip
"""What may be named as a place to write lies below the test's own folders."""


def words_of(chance: Random) -> list[str]:
    """A command line in which up to three words are changed, gone, doubled or new; most often a value."""
    words = chance.choice(LINES).split()
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        given = [place for place, word in enumerate(words) if place and not word.startswith("-")]
        place = (
            chance.choice(given) if given and chance.random() < 0.8 else chance.randrange(1, len(words) + 1)
        )
        new = [chance.choice(VALUES)]
        match chance.randrange(9):
            case 0:
                words[place:place] = new
            case 1:
                del words[place : place + 1]
            case 2:
                words[place:place] = words[place : place + 2]
            case _:
                words[place : place + 1] = new
    return words


@pytest.fixture
def place(tmp_path) -> Path:
    """Folders that a command may look at: the working folder, HOME and the place of temporary files."""
    for name in ("here", "home", "temporary", "inputs"):
        (tmp_path / name).mkdir()
    return tmp_path


def inputs(place: Path, model: Path, text: Path, chance: Random) -> dict[str, Path]:
    """A recipe, data and rows, sound or spoiled."""
    recipe = {**RECIPE, "model": str(model)}
    rows = [{"prompt": "def f(x):\n    return x\n" * 4, "answer": "1"}] * 3
    told = {
        "recipe": ("recipe.yaml", lambda data: yaml.safe_dump(data, sort_keys=False), recipe),
        "rows": ("rows.jsonl", lambda data: "\n".join(map(json.dumps, data)), rows),
        "data": ("data.txt", str, text.read_text()[:1200]),
    }
    files = {"model": model, "out": place / "here" / "out"}
    for name, (file, write, data) in told.items():
        files[name], spoils = place / "inputs" / file, chance.random() < 0.3
        value: Any = spoiled(data, chance) if spoils and not isinstance(data, str) else data
        try:
            said = write(value)
        except (TypeError, ValueError, RecursionError, yaml.YAMLError):
            said = write(data)
        raw = (scribbled(said, chance) if spoils else said).encode("utf-8", "surrogatepass")
        files[name].write_bytes(damaged(raw, chance) if chance.random() < 0.05 else raw)
    return files


@pytest.mark.parametrize("part", range(4))
def test_a_command_line_ends_as_it_should(warm, model, text, place, part):
    wrong = []
    for index in range(part, count(24, 600), 4):
        chance = draws(f"line {index}")
        files = inputs(place, model, text, chance)
        words = [word.format_map(files) for word in words_of(chance)]
        if words[0] == "claims" and "nothing" not in words:
            continue  # it would measure what every paper claims, for minutes
        before = listed(place), listed(model)
        environ = {"HOME": str(place / "home"), "TMPDIR": str(place / "temporary")}
        run = warm.run(*words, cwd=str(place / "here"), environ=environ)
        new = {path for path in listed(place) - before[0] if not asked(path, words)}
        told = run.code in (0, 1) and "Traceback" not in run.stdout + run.stderr
        if not (told or run.in_one_sentence()) or new or listed(model) != before[1]:
            wrong.append(f"line {index}: {words}: {run.code} {run.stderr[-900:]} {sorted(new)[:9]}")
        clear(place)
    assert not wrong, "\n\n".join([f"STROP_SEED={SEED}", *wrong[:12]])


def asked(path: str, words: list[str]) -> bool:
    """Whether a line asks to write here: below --out or -o, the default, or the cache of costs."""
    named = [value for word, value in pairwise(words) if word in ("--out", "-o")]
    inside = [name.partition("/here/")[2] or name for name in named]
    places = ["here/runs", "home/.cache", *(os.path.normpath(f"here/{name}") for name in inside)]
    new = PurePath(path)
    return any(new.is_relative_to(place) or PurePath(place).is_relative_to(new) for place in places)


def clear(place: Path) -> None:
    """Forget what a run wrote."""
    for path in (place / "here").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
