"""Rows that a target writes: a function of their number, whatever was interrupted, up to its own end."""

from copy import deepcopy
from random import Random

import pytest
import torch
from drafting import target
from safetensors.torch import load_file, save_file

from strop.core.errors import StropError
from strop.decode.corpus import Rows, Shape, regenerate

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
    return all(map(torch.equal, (one.ids, one.start, one.end), (other.ids, other.start, other.end)))


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
        assert (greedy[0].tolist() == ids) == (number // 2 % 2 == 0)


def test_rows_are_sampled_at_temperature_one(tmp_path):
    """Whatever the target's own generation settings are."""
    plain, cold = ending(), ending()
    cold.generation_config.update(do_sample=True, temperature=0.01, top_p=0.1, top_k=2)
    expected = regenerate(plain, TEXTS, SHAPE, tmp_path / "plain", quiet)
    assert same(regenerate(cold, TEXTS, SHAPE, tmp_path / "cold", quiet), expected)


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
def test_a_killed_run_goes_on(at, tmp_path, monkeypatch):
    model, shape = ending(), Shape(rows=12, width=32, batch=1, seed=5)
    torch.manual_seed(1)
    whole = regenerate(model, TEXTS, shape, tmp_path / "whole", quiet)
    state = torch.get_rng_state()
    written: list[float] = []

    def dies(what: str, share: float) -> None:
        written.append(share)
        if len(written) == at + 1:
            raise Killed

    with pytest.raises(Killed):
        regenerate(model, TEXTS, shape, tmp_path / "part", dies)
    assert (tmp_path / "part").exists() == (at > 8)
    torch.manual_seed(99)
    written.clear()
    again = regenerate(model, TEXTS, shape, tmp_path / "part", lambda what, share: written.append(share))
    assert same(again, whole) and len(written) == (4 if at > 8 else 12)
    assert torch.equal(torch.random.get_rng_state(), torch.random.manual_seed(99).get_state())
    assert not torch.equal(state, torch.get_rng_state())
    written.clear()
    assert same(regenerate(model, TEXTS, shape, tmp_path / "part", written.append), whole) and not written
    fewer = Shape(rows=5, width=32, batch=1, seed=5)
    assert torch.equal(regenerate(model, TEXTS, fewer, tmp_path / "part", quiet).ids, whole.ids[:5])


@pytest.mark.parametrize("other", [{"width": 40}, {"batch": 3}, {"seed": 4}], ids=str)
def test_rows_of_another_run_are_refused(other, tmp_path):
    model, file = ending(), tmp_path / "rows"
    regenerate(model, TEXTS, SHAPE, file, quiet)
    with pytest.raises(StropError, match="rows of another run"):
        regenerate(
            model, TEXTS, Shape(**{"rows": 7, "width": 32, "batch": 2, "seed": 3, **other}), file, quiet
        )


def test_damaged_rows_and_short_texts_are_refused(tmp_path):
    model, file = ending(), tmp_path / "rows"
    regenerate(model, TEXTS, SHAPE, file, quiet)
    tensors, whole = load_file(file), file.read_bytes()
    save_file({name: x for name, x in tensors.items() if name != "end"}, tmp_path / "short")
    for broken in (whole[:-3], b"", (tmp_path / "short").read_bytes()):
        file.write_bytes(broken)
        with pytest.raises(StropError, match="damaged: remove it"):
            regenerate(model, TEXTS, SHAPE, file, quiet)
    with pytest.raises(StropError, match="no text has more than 16 tokens"):
        regenerate(model, [text[:16] for text in TEXTS], SHAPE, tmp_path / "none", quiet)
