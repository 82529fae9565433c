"""Claims of LazyAttention: experiments run and repeat, controls behave; no hypothesis is tested."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from claiming import require_steady, require_whole

from strop.claims import lazyattention, reuse_bed
from strop.claims.base import Progress, Table, joined
from strop.claims.lazyattention_study import (
    COPY,
    IN_PLACE,
    LAZY,
    NO_FIX,
    RECOMPUTE,
    SYSTEMS,
    answer_study,
    hit_study,
    loss,
    require_same,
    static_study,
    text_study,
)
from strop.claims.reuse_hits import COPIES, PREFIX, WAYS, foreseen, replayed, requests, static
from strop.claims.reuse_hits import LAZY as NAMED
from strop.claims.reuse_ways import PAGE, Copied, Flat, Forgetful, Lazy, Turned, Unturned
from strop.core.errors import StropError
from strop.kv.requests import Request

TINY = reuse_bed.Scale(
    name="tiny",
    seeds=2,
    asked=1,
    queries=2,
    orders=2,
    problems=1,
    texts=1,
    pieces=2,
    cut=32,
    documents=6,
    facts=(2, 3),
    requests=4,
    read=2,
    pools=(12,),
    skews=(2.1,),
    known=60,
    looked_up=3,
    replayed=40,
    sizes=(6, 20),
    alphas=(1.1, 2.1),
    draws=2000,
)
PLAINLY = Progress(lambda what, share: None, 1)


@pytest.fixture(scope="module")
def bed():
    return reuse_bed.lay(TINY, PLAINLY)


@pytest.fixture(scope="module")
def measured(bed):
    """The tables, and the share done before each measurement."""
    shares: list[float] = []
    parts = lazyattention.PAPER.parts(TINY)
    progress = Progress(lambda what, share: shares.append(share), sum(one.steps for one in parts))
    return joined(one.study(bed, progress) for one in parts), shares, progress.expected


def test_every_claim_has_a_verdict_and_plain_details(measured):
    tables, shares, steps = measured
    require_whole(lazyattention.PAPER.verdicts(tables, TINY), 9, "lazyattention", seeds=(2,))
    require_steady(shares, steps)


def test_experiments_repeat(measured, bed):
    tables = measured[0]
    assert answer_study(bed, PLAINLY, TINY, "rag") == tables["answers"].where(model="rag")
    assert text_study(bed, PLAINLY, TINY) == tables["text"].rows
    assert hit_study(None, PLAINLY, TINY) == tables["hits"].rows
    assert static_study(None, PLAINLY, TINY) == tables["static"].rows


def test_claims_need_the_models_and_a_device(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StropError, match="no CUDA device"):
        reuse_bed.lay(reuse_bed.SCALES["gpu"], PLAINLY)
    monkeypatch.setenv("STROP_ZOO", str(tmp_path))
    with pytest.raises(StropError, match="no bundled model"):
        reuse_bed.lay(reuse_bed.SCALES["cpu"], PLAINLY)


# Ways to read.

DOCUMENTS = ["[abc=123;qqq=456;]\n", "[xyz=789;]\n", "[kkk=555;lll=666;mmm=777;]\n"]


def reader(bed, kind, pages=64, name="rag", **fields):
    texts = bed.texts[name]
    return kind(texts.model, texts.tokenizer, pages=pages, page=PAGE, **fields)


def test_copies_compute_what_turned_queries_do(bed):
    """Nats of a query behind two documents, of which the copies were made in another order."""
    texts, tokens = bed.texts["coder"], bed.files[0]
    cut, found = TINY.cut, {}
    first, second = tokens[:cut], tokens[cut : 2 * cut]
    for kind in (Lazy, Copied, Unturned):
        one = kind(texts.model, texts.tokenizer, pages=64, page=PAGE)
        if kind is Copied:
            one.first(tokens[:PAGE], [second, first])
            one.first(tokens[:PAGE], [first, second])
            placed = [one.document(first), one._at(one.document(second), cut)]
            assert all(one._there(document) for document in placed)
            one.request = lambda query, documents, new, placed=placed: Request(query, new, placed)
        found[kind] = loss(one, tokens, cut)
        one.store.check()
    assert found[Copied] == pytest.approx(found[Lazy], abs=1e-4)
    assert abs(found[Unturned] - found[Lazy]) > 1e-2


def test_keys_turned_in_place_compute_what_turned_queries_do(bed):
    """The same nats, after other orders and the loss of a page, which alone is computed again."""
    texts, tokens, cut = bed.texts["coder"], bed.files[0], TINY.cut
    first, second = tokens[:cut], tokens[cut : 2 * cut]
    lazy, one = (kind(texts.model, texts.tokenizer, pages=64, page=PAGE) for kind in (Lazy, Turned))
    for documents in ([second, first], [first], [second, first], [first, second]):
        one.first(tokens[:PAGE], documents)
    assert one.places == {tuple(first): 0, tuple(second): cut}
    assert one.first(tokens[:PAGE], [second, first]).computed_document_tokens == 0
    block = one.document(first).blocks[0]
    one.store.pool.keys[0][one.store._page[block]] += 1.0
    one.store.match([block])
    lost = one.first(tokens[:PAGE], [first, second])
    assert PAGE <= lost.computed_tokens < 2 * PAGE + 1
    one.request = lambda query, documents, new: Request(
        query, new, [one.document(text) for text in documents]
    )
    assert loss(one, tokens, cut) == pytest.approx(loss(lazy, tokens, cut), abs=1e-4)
    one.store.check()


def test_a_block_that_others_hold_or_nobody_wrote_is_not_unsealed(bed):
    store = reader(bed, Lazy).store
    blocks = store.blocks(list(range(5, 5 + PAGE)))
    with pytest.raises(ValueError, match="by its only holder"):
        store.unseal(blocks[0])
    store.acquire(blocks, 0, 0.0)
    store.seal(blocks, 0, [PAGE])
    store.acquire(blocks, 0, 0.0)
    with pytest.raises(ValueError, match="by its only holder"):
        store.unseal(blocks[0])
    store.release(blocks, [], 1.0)
    store.unseal(blocks[0])
    assert not store.sealed(blocks[0])


@pytest.mark.parametrize("kind", (Copied, Turned))
def test_sums_of_turned_pages_are_not_timed(bed, kind, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    one = reader(bed, kind, clock=lambda: clock.now)
    one.first("?abc=", DOCUMENTS)
    sealed = one.store.seal

    def slow(*given):
        clock.now += 100.0
        sealed(*given)

    monkeypatch.setattr(one.store, "seal", slow)
    found = one.first("?abc=", DOCUMENTS[::-1])
    assert one.summing >= 100 and found.first == found.arrived


def test_one_document_at_the_start_needs_no_turn(bed):
    first = [reader(bed, kind).first("?abc=", DOCUMENTS[:1]).output for kind in (Lazy, Unturned, Flat)]
    assert first[0] == first[1] == first[2]


def test_what_systems_compute_again(bed):
    prompt = [sum(len(text) for text in DOCUMENTS), len("?abc=")]
    kept = ((kind, None, 0) for kind in (Copied, Turned, Lazy))
    for kind, again, moved in ((Forgetful, sum(prompt), sum(prompt)), *kept):
        one = reader(bed, kind)
        assert one.first("?abc=", DOCUMENTS).computed_tokens == sum(prompt)
        same = one.first("?abc=", DOCUMENTS)
        other = one.first("?abc=", DOCUMENTS[::-1])
        if again is None:
            assert same.computed_document_tokens == 0 == other.computed_document_tokens == moved
            assert same.computed_tokens <= prompt[1] and other.computed_tokens == prompt[1]
        else:
            assert same.computed_tokens == again and other.computed_tokens == again
        one.store.check()


def test_copies_take_room_that_turned_queries_do_not(bed):
    rooms = {}
    for kind in (Copied, Lazy):
        one = reader(bed, kind)
        for documents in (DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS[1:]):
            one.first("?xyz=", documents)
        rooms[kind] = one.store.residency.cached
    assert rooms[Copied] > rooms[Lazy] == sum(-(-len(text) // PAGE) for text in DOCUMENTS)


@pytest.mark.parametrize("kind", [Copied, Turned])
def test_copies_that_must_give_way_are_made_again(bed, kind):
    """In a store with hardly any room, every request is answered as without a limit."""
    drawn = reuse_bed.drawn(reuse_bed.SCALES["cpu"], 0.0, 0)[:4]
    tight, wide = (reader(bed, kind, pages) for pages in (50, 600))
    for documents, query in drawn:
        one, other = (system.first(query, documents) for system in (tight, wide))
        assert one.output == other.output and one.computed_tokens >= other.computed_tokens
        tight.store.check()


def test_systems_that_disagree_stop_the_experiment(bed):
    one = reader(bed, Lazy).first("?abc=", DOCUMENTS)
    other = reader(bed, Lazy).first("?abc=", DOCUMENTS)
    require_same({LAZY: [one], COPY: [other]}, LAZY, COPY)
    other.tokens[-1] += 1
    with pytest.raises(RuntimeError, match="control failed: lazy and turned copies agree on 0%"):
        require_same({LAZY: [one], COPY: [other]}, LAZY, COPY)


def test_questions_hold_their_answers(bed):
    for name in ("rag", "reasoner"):
        for one in reuse_bed.questions(name, TINY, 0, 0):
            text = "".join(one.documents)
            key = one.query.strip("?=") if name == "rag" else one.answer.split("=")[0]
            assert f"{key}={one.answer.split(' sum')[0].split('=')[-1]};" in text
    given, turned = (reuse_bed.questions("rag", TINY, 0, order) for order in (0, 1))
    assert [(q.query, q.answer) for q in given] == [(q.query, q.answer) for q in turned]
    assert sorted(given[0].documents) == sorted(turned[0].documents)


# Hits.


def test_hits_by_hand():
    asked = np.array([[0, 1], [1, 0], [0, 2]])
    assert [replayed(way, 6, asked) for way in WAYS] == [pytest.approx(x / 6) for x in (3, 3, 1)]
    assert replayed(NAMED, 2, asked) == pytest.approx(3 / 6)
    with pytest.raises(RuntimeError, match="does not fit"):
        replayed(COPIES, 1, asked)


def test_documents_of_a_request_differ_and_the_likely_come_most():
    drawn = requests(50, 1.5, 5, 400, 0)
    assert all(len(set(row)) == 5 for row in drawn.tolist())
    counts = np.bincount(drawn.ravel(), minlength=50)
    assert counts[0] == counts.max() and counts[:5].sum() > counts[-25:].sum()
    assert replayed(PREFIX, 50, drawn) < replayed(NAMED, 50, drawn)


def test_the_equation_is_what_a_static_cache_does():
    for places in (1, 5):
        told = foreseen(200, 1.1, 40, places)
        assert static(200, 1.1, 40, places, 100_000, 0) == pytest.approx(told, rel=0.02)
    assert foreseen(200, 1.1, 200, 1) == pytest.approx(1) and foreseen(200, 1.1, 4, 5) == 0


# Verdicts.


@pytest.mark.parametrize(
    ("copied", "in_place", "verdict"),
    [(1.5, 1.4, "reproduced"), (1.5, 1.1, "partly"), (1.1, 1.5, "partly"), (2.0, 0.9, "not here")],
)
def test_first_tokens_are_judged_by_the_sooner_of_two(measured, copied, in_place, verdict):
    times = {COPY: copied, IN_PLACE: in_place}
    rows = [row | {"ttft_s": [times.get(row["system"], 1.0)] * 2} for row in measured[0]["first"].rows]
    assert lazyattention.sooner(TINY, Table(rows, 0.0)).verdict == verdict
    assert {row["system"] for row in rows} == set(SYSTEMS) >= {RECOMPUTE}


@pytest.mark.parametrize(
    ("lost", "verdict"), [((0.1, 0.1), "reproduced"), ((0.1, 0.0), "partly"), ((0.0, 0.0), "not here")]
)
def test_a_missing_turn_is_judged_by_text_and_answers(measured, lost, verdict):
    nats, points = lost
    tables = measured[0]
    text = [row | {"nats": [1 + nats * (row["way"] == NO_FIX)] * 2} for row in tables["text"].rows]
    right = [row | {"right": [0.9 - points * (row["way"] == NO_FIX)] * 2} for row in tables["answers"].rows]
    assert lazyattention.unfixed(TINY, Table(right, 0.0), Table(text, 0.0)).verdict == verdict
