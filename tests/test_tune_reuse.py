"""Prompts that share documents or sessions: what `tune` reads of them, tries, measures and shows."""

import json
from pathlib import Path

import pytest
from test_cli import save_tiny, strop_

import strop
from strop import recipe
from strop.audit import speed
from strop.core.errors import StropError
from strop.decode import PromptLookup
from strop.kv import DocumentStore, KVarN, SegmentCache
from strop.kv.reuse import Documents, Segments
from strop.model import Model
from strop.recipe import Recipe
from strop.tasks.data import read_data
from strop.tasks.documents import Size, look_ups
from strop.tune import measure, shared, workload
from strop.tune import reuse as reusing
from strop.tune.engine import Settings, tune
from strop.tune.frontier import judge

DOCUMENTS = ["The tea is red and hot, they say.\n", "A bun costs four, or three at night.\n", "No.\n"]
FIELDS = {"prompts", "prompt_tokens", "computed_tokens", "prefix_computed_tokens", "recomputed_tokens"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Less of everything: what is tested here is the path, not the numbers."""
    monkeypatch.setattr(workload, "SCORED_TOKENS", 300)
    monkeypatch.setattr(workload, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(shared, "CONTINUATION", 8)
    monkeypatch.setattr(reusing, "SCORED", 64)
    monkeypatch.setattr(speed, "LEAST_ROUNDS", 4)
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    monkeypatch.setattr(recipe, "ALWAYS", {"weights": (), "kv": (), "decode": ()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("reuse") / "model", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def lm(folder) -> Model:
    return strop.load(folder)


def file(place: Path, rows: list[dict]) -> Path:
    path = place / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents(place: Path) -> Path:
    orders = ([0, 1, 2], [2, 1, 0], [1, 0], [1, 2, 0])
    rows = [
        {"documents": [DOCUMENTS[i] for i in order], "prompt": f"Question {number}: what is it, then?"}
        for number, order in enumerate(orders)
    ]
    return file(place, rows)


def sessions(place: Path) -> Path:
    texts, rows = {name: f"Hello, I am {name}. " for name in "abcd"}, []
    for turn in range(3):
        for name in texts:
            texts[name] += f"Here comes turn {turn} of {name}, which is all there is. "
            rows.append({"session": name, "prompt": texts[name]})
    return file(place, rows)


def rows_of(study: dict) -> dict[str, dict]:
    return {row["label"]: row for row in study["rows"]}


def test_documents_are_a_row_with_its_first_token_and_what_it_computed(folder, tmp_path):
    study = tune(str(folder), documents(tmp_path), tmp_path / "out", Settings(max_drop=0.9))
    as_is, *rows = study["rows"]
    assert as_is["status"] == "measured", as_is["reason"]
    assert "reuse" not in as_is and [row["slots"]["reuse"].split()[0] for row in rows] == ["documents"] * 2
    for row, repair in zip(rows, (0, 16), strict=True):
        assert row["status"] == "measured", row["reason"]
        assert row["recipe"]["reuse"]["documents"]["repair"] == repair
        told = row["reuse"]
        assert row["reuse"].keys() > FIELDS and told["prompts"] == 4
        for part in ("cold", "warm", "beside_prefix"):
            estimate, low, high = told[f"{part}_ratio"]
            assert 0 < low <= estimate <= high
        assert row["speed"]["ttft_ratio"][0] > 0 and row["speed"]["step_s"] > 0
        assert row["memory"]["kv_bytes"] == row["memory"]["kv_bytes_measured"] > 0
        assert row["memory"]["ratio"] > 1 and row["quality"]["drop_hi"] > 0
        assert row["quality"]["kl"] > 1e-6, "a document that is read alone is another input"
    plain, repaired = (row["reuse"]["computed_tokens"] for row in rows)
    text = sum(map(len, DOCUMENTS)) + 4 * len("Question 0: what is it, then?")
    assert plain == text < repaired, "each document once, each query; bytes are tokens here"
    assert plain < rows[0]["reuse"]["prefix_computed_tokens"] <= rows[0]["reuse"]["prompt_tokens"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "First token, warm" in page and rows[0]["label"] in page and "prefix caching" in page


def test_sessions_lose_nothing_and_holes_are_counted(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "LEAST_ROUNDS", 12)
    study = tune(str(folder), sessions(tmp_path), tmp_path / "out", Settings(max_drop=0.9, dtype="fp32"))
    full, half, packed = study["rows"][1:]
    assert [row["slots"]["reuse"].split()[0] for row in (full, half, packed)] == ["segments"] * 3
    for row in (full, half):
        assert row["status"] == "measured", row["reason"]
        assert row["quality"]["agreement"] == 1.0 and row["quality"]["drop_hi"] < 1e-4
    assert full["reuse"]["recomputed_tokens"] == 0 < half["reuse"]["recomputed_tokens"]
    assert full["reuse"]["computed_tokens"] == full["reuse"]["prefix_computed_tokens"]
    assert full["reuse"]["computed_tokens"] < full["reuse"]["prompt_tokens"]
    assert half["memory"]["kv_bytes"] < full["memory"]["kv_bytes"]
    assert packed["status"] == "measured" and packed["quality"]["kl"] > 0
    assert packed["memory"]["kv_bytes"] < full["memory"]["kv_bytes"]


def test_long_documents_are_tried_packed():
    def bits(length):
        asks = [shared.Ask((), ((1,) * length, (2,) * length), (3,), 0, None, (), 8)]
        return [method.bits for method in shared.reuse_methods(asks)]

    assert bits(100) == [16, 16] and bits(300) == [16, 16, 4]
    turn = shared.Ask((), (), (3,) * 20, None, None, (), 8)
    assert {method.bits for method in shared.reuse_methods([turn])} == {16}, "too few pages to keep some open"


def test_right_answers_behind_documents_count_for_the_drop(tmp_path):
    rows = [
        {"documents": asked.documents, "prompt": query, "answer": answer}
        for asked in look_ups(3, 1, Size(documents=(3, 3), facts=(2, 2), queries=2))
        for query, answer in zip(asked.queries, asked.answers, strict=True)
    ]
    data = read_data(file(tmp_path, rows))
    base = strop.load("zoo:rag", dtype="fp32")
    work = workload.build(base, data, None, 1, 0)
    [method, _] = shared.reuse_methods(work.asks)
    bench = measure.Bench(base, work)
    found = bench.row(base.with_(reuse=method))
    assert found["status"] == "measured", found["reason"]
    assert found["quality"]["exact_match"] == 1.0, "it was trained to read documents alone"
    assert found["quality"]["exact_match_loss_hi"] > 0.4, "six problems cannot show that nothing is lost"


def test_a_method_that_the_data_has_nothing_for_is_refused(folder, tmp_path):
    for name, wanted in (("documents", "documents"), ("segments", "session")):
        data = sessions(tmp_path) if name == "documents" else documents(tmp_path)
        rows = rows_of(tune(str(folder), data, tmp_path / name, Settings(methods=(name,))))
        [as_is, refused] = rows.values()
        assert as_is["status"] == "measured", as_is["reason"]
        assert refused["label"].startswith(name) and f'"{wanted}"' in refused["reason"]


def test_reuse_joins_neither_a_cache_nor_drafts(lm):
    for other in ({"kv": KVarN()}, {"decode": PromptLookup()}):
        with pytest.raises(StropError, match="keeps pages of its own"):
            lm.with_(reuse=Documents(), **other)


def test_a_recipe_round_trips_and_is_never_ignored(folder, tmp_path):
    for method, kind in ((Documents(repair=16), DocumentStore), (Segments(pages=64), SegmentCache)):
        path = tmp_path / "recipe.yaml"
        Recipe(model=str(folder), reuse=method).save(path)
        assert Recipe.load(path).reuse == method
        model = strop.load(path)
        assert isinstance(model.recipe.reuse.open(model), kind)
        assert model.recipe.reuse.open(model).store.pages == method.pages
        with pytest.raises(StropError, match=r"lm\.recipe\.reuse\.open\(lm\)"):
            model.generate(["x"], max_new_tokens=2)
        said = strop_("generate", path, "--prompt", "x", code=2)
        assert kind.__name__ in " ".join(said.output.split())
    answer = model.recipe.reuse.open(model).generate("Hello", 3)
    assert answer.token_ids == strop.load(folder).generate_ids([model.encode("Hello")], 3)[0]


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"documents": {"page": 12}}, "page must be one of 8, 16"),
        ({"documents": {"pages": 0}}, "pages must be 1 or more"),
        ({"documents": {"repair": 5}}, "repair must be a multiple of page"),
        ({"segments": {"evictor": "belady"}}, "evictor must be one of lru"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(node, words):
    with pytest.raises(StropError, match=words):
        Recipe.from_dict({"strop": 1, "reuse": node})


def test_the_first_token_counts_where_pages_are_shared():
    def row(label: str, first: float, step: float, reuse: dict | None = None) -> dict:
        speed = {"step_ratio": [step] * 3, "ttft_ratio": [first] * 3}
        memory, quality = {"ratio": 1.1}, {"drop_hi": 0.0}
        row = {"label": label, "status": "measured", "memory": memory, "quality": quality, "speed": speed}
        return row | ({"reuse": reuse} if reuse else {})

    rows = [row("as is", 1.0, 1.0), row("shared", 0.2, 1.5, {"prompts": 4}), row("slow", 1.0, 1.5)]
    rows[0]["memory"] = {"ratio": 1.0}
    assert judge(rows, "balanced", 0.01)["label"] == "as is"
    assert rows[1]["on_frontier"] and rows[2]["dominated_by"] == "as is"
    assert judge(rows, "ttft", 0.01)["label"] == "shared"
