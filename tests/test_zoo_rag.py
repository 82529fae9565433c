"""The bundled reader of documents and its ordinary twin: what their cards say is what their weights do."""

import importlib
import json
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from strop.kv.document_rows import alone, in_sequence, tokenized
from strop.kv.document_training import answered, require_placeable
from strop.models.zoo import card, zoo_path, zoo_root
from strop.tasks.documents import Size, is_held_out, look_ups

MASKS = {"alone": alone, "in sequence": in_sequence}
TRAINED = {"rag": "alone", "rag-dense": "in sequence"}
"""The mask under which each was trained."""


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    """The training script, which lives beside the models."""
    monkeypatch.syspath_prepend(str(zoo_root()))
    return importlib.import_module("train_rag")


def _load(name):
    model = AutoModelForCausalLM.from_pretrained(zoo_path(name), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(zoo_path(name))


def _metrics(name):
    return json.loads((zoo_path(name) / "metrics.json").read_text())


def _right(name, drawn, mask):
    model, tokenizer = _load(name)
    rows = [tokenized(tokenizer, one.documents, one.queries, one.answers) for one in drawn]
    return answered(model, rows, MASKS[mask])


def _share(right):
    flat = [one for row in right for one in row]
    return sum(flat) / len(flat)


@pytest.mark.parametrize("name", TRAINED)
def test_folders_are_small_and_can_be_placed(name):
    assert (zoo_path(name) / "model.safetensors").stat().st_size <= 8_000_000
    model, tokenizer = _load(name)
    require_placeable(model)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("name", TRAINED)
def test_cards_say_what_they_must(name):
    text, record = card(name), json.loads((zoo_path(name) / "training.json").read_text())
    for needed in ("Architecture", "Data", "seed", "icence", "minutes on", "The prompt", "not for"):
        assert needed in text, needed
    assert f"{record['tokens']:,}" in text and record["device"] in text
    for mask in MASKS:
        assert f"{100 * _metrics(name)[mask]['documents']['8']['share']:.1f} % (" in text


def test_twins_differ_in_the_mask_alone():
    rag, dense = (json.loads((zoo_path(name) / "training.json").read_text()) for name in TRAINED)
    assert rag["plan"] == dense["plan"] and rag["tokens"] == dense["tokens"]
    tokenizers = {(zoo_path(name) / "tokenizer.json").read_bytes() for name in (*TRAINED, "reasoner")}
    assert len(tokenizers) == 1


def test_documents_and_queries_have_the_tokens_of_the_whole_prompt():
    tokenizer = AutoTokenizer.from_pretrained(zoo_path("rag"))
    for drawn in look_ups(5, seed=1):
        parts = [*drawn.documents, drawn.queries[0]]
        prompt = drawn.example().prompt
        whole = tokenizer(prompt)["input_ids"]
        assert [token for part in parts for token in tokenizer(part)["input_ids"]] == whole
        assert tokenizer.decode(whole) == prompt


def test_values_are_found_wherever_their_document_stands():
    """Among the fewest and the most documents, held-out keys and values alike."""
    for count in (2, 8):
        drawn = look_ups(8, seed=77, size=Size((count, count)))
        for order in (range(count), range(count - 1, -1, -1)):
            assert _share(_right("rag", [one.reordered([*order]) for one in drawn], "alone")) > 0.9


def test_greedy_generation_ends_behind_the_value():
    """The dense twin, whose mask is that of plain generation; `answered` says the same of each question."""
    model, tokenizer = _load("rag-dense")
    right = []
    for drawn in look_ups(10, seed=5, size=Size((2, 4), queries=1)):
        ids = tokenizer(drawn.example().prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)
        written = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        right.append([written == drawn.answers[0]])
    assert right == _right("rag-dense", look_ups(10, seed=5, size=Size((2, 4), queries=1)), "in sequence")
    assert _share(right) > 0.8


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("mask", MASKS)
def test_recorded_measures_are_those_of_the_weights(script, name, mask):
    """All look-ups in three documents that the card counts, answered again; near-ties may turn."""
    drawn = look_ups(script.LOOK_UPS, script.JUDGED, Size((3, 3), queries=script.SIZE.queries))
    again = _share(_right(name, drawn, mask))
    assert again == pytest.approx(_metrics(name)[mask]["documents"]["3"]["share"], abs=0.01)


def test_rows_of_a_step_follow_from_it_and_hold_no_held_out_text(script):
    tokenizer = AutoTokenizer.from_pretrained(zoo_path("reasoner"))
    rows = script.LookUpRows(tokenizer, 0)
    assert rows(200) == rows(200) != rows(201)
    keys = {tokenizer.decode(query)[1:4] for row in rows(200) for query, _ in row.questions}
    assert keys and not any(map(is_held_out, keys))
    assert len({len(row.documents) for row in rows(200)}) == 1
