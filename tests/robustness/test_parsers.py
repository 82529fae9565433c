"""Recipes, data and bit plans that are nonsense: an object that round-trips, or one sentence, and soon."""

import json
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from robustness.mutate import damaged, scribbled, spoiled
from strop.core.errors import StropError
from strop.decode.base import Drafted
from strop.decode.cost import CostModel
from strop.recipe import METHODS, Recipe
from strop.tasks.data import read_data
from strop.weights.plan import BitPlan

nonsense = settings(settings.get_profile("robustness"))
SECONDS = 5
drawn = given(chance=st.randoms(use_true_random=False))


@contextmanager
def limited():
    """What takes more processor time is interrupted, and fails."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done in {SECONDS} seconds")

    before, start = signal.signal(signal.SIGPROF, late), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert time.process_time() - start < SECONDS


def read(parse: Callable[[Path], Any], path: Path, raw: bytes) -> Any:
    """What `parse` makes of a file, or None where it refuses it as users are promised."""
    path.write_bytes(raw)
    try:
        with limited():
            return parse(path)
    except StropError as error:
        sentence = str(error)
        assert sentence.strip() and len(sentence) < 2000, sentence[:3000]
        return None


def filled() -> list[dict[str, Any]]:
    """A recipe of every method, and some of several."""
    recipes = []
    for slot, methods in METHODS.items():
        for kind in methods.values():
            settings = {"drafter": "ngram"} if issubclass(kind, Drafted) else {}
            recipes.append(Recipe(model="zoo:coder", **{slot: kind(**settings)}).to_dict())
    nested = {"vase": {"budget": 512, "store": {"kvarn": {"bits_k": 4, "group": 64}}}}
    recipes.append({"strop": 1, "model": "x", "weights": {"alphaq": {"widths": [2, 3]}}, "kv": nested})
    return recipes


RECIPES = filled()
PLAN = {
    "strop_plan": 1, "method": "alphaq", "budget": 3.0, "gamma": 1.0, "signal": True, "said": "so",
    "objective": 1.5, "tile": 32,
    "rows": [
        {"name": f"layers.{i}.up", "outputs": 64, "inputs": 64, "expert": bool(i), "bits": i + 2, "group": 32,
         "symmetric": True, "effective_bits": i + 2.5, "alpha": 3.0, "tokens": 7}
        for i in range(2)
    ],
}  # fmt: skip
ROWS = [
    {"prompt": "def f():", "answer": 3},
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "é"}]},
    {"prompt": "x" * 300, "answer": "y", "messages": None},
]
COST = {"strop": 1, "curves": {"64": {"1": 0.1, "8": 0.2}}, "draft_s": 0.1, "draft_slope": 0.0, "node_s": 0.0}


def spelled(data: Any, chance: Random, write: Callable[[Any], str]) -> bytes:
    """A file of spoiled data, its text scribbled on or its bytes damaged."""
    how = chance.randrange(4)
    try:
        text = write(spoiled(data, chance) if how < 3 else data)
    except (yaml.YAMLError, ValueError, RecursionError):
        text = write(data)
    if how:
        text = scribbled(text, chance)
    raw = text.encode("utf-8", "surrogatepass")
    return damaged(raw, chance) if chance.random() < 0.2 else raw


def as_yaml(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False)


def as_rows(data: Any) -> str:
    rows = data if isinstance(data, list) else [data]
    return "\n".join(json.dumps(row) for row in rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nonsense")


@nonsense
@drawn
def test_a_recipe_is_read_or_refused(place, chance):
    recipe = read(Recipe.load, place / "r.yaml", spelled(chance.choice(RECIPES), chance, as_yaml))
    if recipe is not None:
        assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
        assert recipe.label() and recipe.digest()


@nonsense
@drawn
def test_data_is_read_or_refused(place, chance):
    name = chance.choice(("d.jsonl", "d.json", "d.txt", "d"))
    data = read(read_data, place / name, spelled(ROWS, chance, as_rows))
    if data is not None:
        assert data.rows and len(data.fingerprint) == 16
        for row in data.rows:
            said = [row.prompt] if isinstance(row.prompt, str) else [m["content"] for m in row.prompt]
            assert all(isinstance(text, str) and text.encode() is not None for text in said)


@nonsense
@drawn
def test_a_bit_plan_is_read_or_refused(place, chance):
    plan = read(BitPlan.load, place / "p.yaml", spelled(PLAN, chance, as_yaml))
    if plan is not None:
        assert BitPlan.from_dict(yaml.safe_load(plan.to_yaml())) == plan
        assert plan.to_csv()


@nonsense
@drawn
def test_a_cost_model_is_read_or_refused(place, chance):
    model = read(CostModel.load, place / "c.json", spelled(COST, chance, json.dumps))
    if model is not None:
        model.save(place / "again.json")
        assert CostModel.load(place / "again.json").curves == model.curves
