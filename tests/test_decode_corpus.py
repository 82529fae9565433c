"""Rows that a target writes: a function of their number, whatever was interrupted; and texts held out."""

from copy import deepcopy
from dataclasses import replace
from random import Random

import pytest
import torch
from drafting import target
from safetensors.torch import load_file, save_file

from strop.core.errors import StropError
from strop.decode.corpus import Document, Rows, Shape, hold_out, regenerate

SHAPE = Shape(rows=7, width=32, batch=2, seed=3)
TEXTS = [[Random(n).randrange(2, 61) for _ in range(n)] for n in (40, 90, 17, 16, 60)]


def quiet(what: str, share: float) -> None:
    pass


def ending(*ends: int):
    model = deepcopy(target("llama", 2))
    model.generation_config.eos_token_id = list(ends) or None
    model.generation_config.pad_token_id = 0
    return model


def same(one: Rows, other: Rows) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("ids", "start", "end", "greedy")
    )


def test_rows_are_prompts_and_what_the_target_wrote(tmp_path):
    model = ending()
    rows = regenerate(model, TEXTS, SHAPE, tmp_path / "rows", quiet)
    assert len(rows) == 7 and rows.ids.shape == (7, 32)
    assert SHAPE.prompt == (2, 16) and (rows.end == 32).all()
    assert (rows.start >= 2).all() and (rows.start <= 16).all()
    for number, (ids, start) in enumerate(zip(rows.ids.tolist(), rows.start.tolist(), strict=True)):
        texts = [text for text in TEXTS if len(text) > 16]
        assert any(ids[:start] == t[i : i + start] for t in texts for i in range(len(t)))
        given = torch.tensor([ids[:start]])
        greedy = model.generate(given, attention_mask=torch.ones_like(given), max_length=32, do_sample=False)
        assert (greedy[0].tolist() == ids) == (number // 2 % 2 == 0) == bool(rows.greedy[number])
    assert rows.at(torch.tensor([5, 1]), rows.ids.device).greedy.tolist() == [True, True]
    assert rows.at(torch.tensor([2, 4]), rows.ids.device).greedy.tolist() == [False, True]


def test_rows_are_sampled_at_temperature_one(tmp_path):
    """Whatever the target's own generation settings are."""
    plain, cold = ending(), ending()
    cold.generation_config.update(
        do_sample=True,
        temperature=0.01,
        top_p=0.1,
        top_k=2,
        min_p=0.5,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        max_new_tokens=3,
        num_beams=2,
    )
    own = cold.generation_config.to_dict()
    expected = regenerate(plain, TEXTS, SHAPE, tmp_path / "plain", quiet)
    assert same(regenerate(cold, TEXTS, SHAPE, tmp_path / "cold", quiet), expected)
    assert cold.generation_config.to_dict() == own


def test_an_end_of_text_ends_a_row(tmp_path):
    free = regenerate(ending(), TEXTS, SHAPE, tmp_path / "free", quiet)
    ends = free.ids[torch.arange(7), free.start + 3].tolist()[:3]
    rows = regenerate(ending(*ends), TEXTS, SHAPE, tmp_path / "ended", quiet)
    assert (rows.end < 32).any() and torch.equal(rows.start, free.start)
    for ids, start, end in zip(rows.ids, rows.start, rows.end, strict=True):
        found = torch.isin(ids[start:end], torch.tensor(ends))
        assert not found[:-1].any() and (found[-1] or end == 32) and (ids[end:] == 0).all()
    greedy = [0, 1, 4, 5]
    for row in greedy:
        assert torch.equal(rows.ids[row, : rows.end[row]], free.ids[row, : rows.end[row]])
    single = ending()
    single.generation_config.eos_token_id = ends[0]
    assert (regenerate(single, TEXTS, SHAPE, tmp_path / "single", quiet).end < 32).any()


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 9, 11])
def test_a_killed_run_goes_on(at, tmp_path):
    model, shape = ending(), Shape(rows=12, width=32, batch=1, seed=5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = regenerate(model, TEXTS, shape, tmp_path / "whole", quiet)
    assert torch.equal(state, torch.get_rng_state())
    written: list[float] = []

    def dies(what: str, share: float) -> None:
        written.append(share)
        if len(written) == at + 1:
            raise Killed

    part = tmp_path / "part"
    with pytest.raises(Killed):
        regenerate(model, TEXTS, shape, part, dies)
    kept = {file: file.stat().st_mtime_ns for file in part.iterdir()}
    assert len(kept) == at, "a file a batch"
    torch.manual_seed(99)
    written.clear()
    again = regenerate(model, TEXTS, shape, part, lambda what, share: written.append(share))
    assert same(again, whole) and written == [number / 12 for number in range(at, 12)]
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    written.clear()
    assert same(regenerate(model, TEXTS, shape, part, written.append), whole) and not written
    fewer = Shape(rows=5, width=32, batch=1, seed=5)
    assert torch.equal(regenerate(model, TEXTS, fewer, part, written.append).ids, whole.ids[:5])


@pytest.mark.parametrize("other", ["width", "batch", "seed", "texts", "target"])
def test_rows_of_another_run_are_not_taken(other, tmp_path):
    model, texts = ending(), TEXTS
    regenerate(model, texts, SHAPE, tmp_path / "both", quiet)
    shape = replace(SHAPE, **{other: getattr(SHAPE, other) + 1}) if hasattr(SHAPE, other) else SHAPE
    if other == "texts":
        texts = [*TEXTS[:-1], [2 + token % 50 for token in TEXTS[-1]]]
    elif other == "target":
        model = ending()
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(-1)
    expected = regenerate(model, texts, shape, tmp_path / "alone", quiet)
    assert same(regenerate(model, texts, shape, tmp_path / "both", quiet), expected)
    first = regenerate(ending(), TEXTS, SHAPE, tmp_path / "both", quiet)
    assert not same(first, expected)


def test_damaged_rows_and_short_texts_are_refused(tmp_path):
    model = ending()
    regenerate(model, TEXTS, SHAPE, tmp_path, quiet)
    file = sorted(tmp_path.iterdir())[1]
    tensors, whole = load_file(file), file.read_bytes()
    save_file({name: x for name, x in tensors.items() if name != "end"}, tmp_path / "short")
    for broken in (whole[:-3], b"", (tmp_path / "short").read_bytes()):
        file.write_bytes(broken)
        with pytest.raises(StropError, match=f"{file.name} is damaged: remove it"):
            regenerate(model, TEXTS, SHAPE, tmp_path, quiet)
    with pytest.raises(StropError, match="no text has more than 16 tokens"):
        regenerate(model, [text[:16] for text in TEXTS], SHAPE, tmp_path / "none", quiet)


def documents(*lengths: int) -> list[Document]:
    """Tokens that no two documents share."""
    return [[10_000 * number + place for place in range(length)] for number, length in enumerate(lengths)]


def sources(pieces: list[Document]) -> set[int]:
    return {token // 10_000 for piece in pieces for token in piece}


@pytest.mark.parametrize("lengths", [[3000] * 40, [*range(2000, 4000, 50)], [2500] * 20])
def test_whole_documents_are_held_out_where_there_are_many(lengths):
    given = documents(*lengths)
    train, held_out = hold_out(given)
    assert not sources(train) & sources(held_out)
    assert sorted(token for piece in (*train, *held_out) for token in piece) == sorted(
        token for document in given for token in document
    )
    assert 0.05 * sum(lengths) <= sum(map(len, held_out)) <= 0.05 * sum(lengths) + max(lengths)
    assert hold_out(given[::-1]) == (train, held_out)


@pytest.mark.parametrize("lengths", [[990] * 5, [*[20] * 30, 900]])
def test_pieces_are_held_out_where_documents_are_few_or_one_is_most_of_them(lengths):
    for shift in range(20):
        given = [[token + shift for token in document] for document in documents(*lengths)]
        train, held_out = hold_out(given)
        assert sum(map(len, held_out)) < 0.25 * sum(lengths) and not set(train) & set(held_out)


def test_texts_that_are_all_the_same_are_refused():
    with pytest.raises(StropError, match="has 2000 tokens, too few"):
        hold_out([list(range(100))] * 20)
