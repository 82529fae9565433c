"""What the server writes is what Model.generate writes for the prompt alone, whatever shares the batch: in
float32, as here; coarser numbers are rounded by the size of the batch.
"""

import queue
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import END, PROMPTS, asking, metric, row, running, tiny_lm, whole
from starlette.testclient import TestClient
from transformers import TopPLogitsWarper

from strop.core.errors import StropError
from strop.decode import CaDDTree, DDTree, PromptLookup
from strop.decode.stats import Stats
from strop.kv import RKV, KVarN, Quantized, VaSE
from strop.server.app import create_app
from strop.server.draw import Draw
from strop.server.engine import SHORT, Engine
from strop.server.group import Group
from strop.server.row import Piece, Row
from strop.server.text import TextStream

TILES = KVarN(bits=4, group=8, sinks=8, tail=8)
KV = {
    "dense": None,
    "kvarn": TILES,
    "vase": VaSE(budget=16, buffer=4),
    "rkv": RKV(budget=24, buffer=8),
    "fp8": Quantized(backend="fp8", bits=8),
}
COUNTED = ("drafts", "draft_tokens", "accepted_tokens")
DECODE = {"lookup": PromptLookup(), "ngram tree": DDTree(drafter="ngram", budget=8)}


@pytest.mark.parametrize("kv", KV)
def test_rows_of_a_batch_are_written_as_if_alone(kv):
    """Greedy and drawn rows of all lengths, in groups that form and shrink as rows come and end."""
    lm = tiny_lm().with_(kv=KV[kv])
    with running(lm, batch=4) as engine:
        told = []
        for number, prompt in enumerate(PROMPTS):
            for draw in (None, Draw(5, 1, 0.8)):
                pieces: queue.Queue = queue.Queue()
                told.append((pieces, prompt, 9 + 7 * number, draw))
        rows = [row(lm, prompt, most, pieces, draw=draw) for pieces, prompt, most, draw in told]
        engine.submit(rows)
        texts = [whole(pieces)[0] for pieces, *_ in told]
    for text, (_, prompt, most, draw) in zip(texts, told, strict=True):
        chance = {} if draw is None else {"seed": 5, "temperature": 0.8, "samples": 2}
        assert text == lm.generate([prompt], most, **chance)[-1]


@pytest.mark.parametrize("decode", DECODE)
@pytest.mark.parametrize("kv", ["dense", "kvarn"])
def test_drafted_recipes_write_the_same(kv, decode):
    lm = tiny_lm().with_(kv=KV[kv] and KVarN(bits=4, group=8, sinks=8, tail=8), decode=DECODE[decode])
    plain = tiny_lm().with_(kv=KV[kv])
    with running(lm) as engine:
        client = TestClient(create_app(engine))
        said = client.post("/v1/completions", json=asking(PROMPTS[:2], max_tokens=40)).json()
        drawn = client.post("/v1/completions", json=asking("ab ab ab", seed=3, temperature=0.6, n=2)).json()
        assert engine.wait_idle(10)
        counted = {kind: metric(engine, f"vllm:spec_decode_num_{kind}_total") for kind in COUNTED}
    assert [choice["text"] for choice in said["choices"]] == plain.generate(PROMPTS[:2], 40)
    expected = plain.generate(["ab ab ab"], 24, seed=3, temperature=0.6, samples=2)
    assert [choice["text"] for choice in drawn["choices"]] == expected
    stats = Stats()
    drawn_too = (["ab ab ab"], 24, {"seed": 3, "temperature": 0.6, "samples": 2})
    for prompts, most, chance in ((PROMPTS[:2], 40, {}), drawn_too):
        lm.generate(prompts, most, **chance)
        if lm.stats is None:  # transformers' own drafts, which it does not count
            assert set(counted.values()) == {None}
            return
        stats += lm.stats
    assert counted == {
        "drafts": stats.rounds - stats.nodes[0],
        "draft_tokens": sum(nodes * rounds for nodes, rounds in stats.nodes.items()),
        "accepted_tokens": stats.emitted - stats.rounds,
    }
    assert counted["draft_tokens"] > 0


def test_a_model_with_a_repetition_penalty_is_left_to_generate(monkeypatch):
    lm = tiny_lm()
    monkeypatch.setattr(lm.model.generation_config, "repetition_penalty", 1.3)
    with running(lm) as engine:
        assert engine.alone
        said = TestClient(create_app(engine)).post("/v1/completions", json=asking("aaaa")).json()
    assert said["choices"][0]["text"] == lm.generate(["aaaa"], 24)[0]


def test_the_nucleus_is_that_of_transformers():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    for top_p in (0.05, 0.4, 0.9, 1.0):
        scores = Draw(1, 0, 0.7, top_p).scores(logits, 9)
        kept = TopPLogitsWarper(top_p)(None, logits[None] / 0.7)[0].isfinite() if top_p < 1 else logits < 99
        assert torch.equal(scores.isfinite(), kept)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), st.lists(st.text("ab♫é ", min_size=1, max_size=3), max_size=3), st.data())
def test_pieces_join_to_the_text_and_end_before_a_stop(raw, stops, data):
    tokenizer = tiny_lm().tokenizer
    text = data.draw(st.one_of(st.text("ab♫é ", max_size=30), st.just(raw.decode("latin-1"))))
    tokens = tokenizer(text)["input_ids"]
    stream, pieces = TextStream(tokenizer, stops), []
    for token in tokens:
        if not stream.stopped:
            pieces.append(stream.add(token))
    pieces.append("" if stream.stopped else stream.end())
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    _, first = min(found, default=(0, len(text)))  # of stops that overlap, the one that is whole first
    assert "".join(pieces) == text[:first]
    assert stream.stopped == (first < len(text))
    assert all("\ufffd" not in piece for piece in pieces)


def test_of_stops_that_overlap_the_first_to_be_whole_counts_however_text_comes():
    """As one token of many letters brings both, or as letters bring one after the other."""
    for parts in (["xabay"], list("xabay")):
        stream = TextStream(tiny_lm().tokenizer, ["aba", "b"])
        said = [stream._pass(part) for part in parts if not stream.stopped]
        assert "".join(said) == "xa"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 256), max_size=14))
def test_bytes_that_are_no_text_come_as_decoding_has_them(tokens):
    tokenizer = tiny_lm().tokenizer
    stream = TextStream(tokenizer)
    assert "".join([stream.add(token) for token in tokens] + [stream.end()]) == tokenizer.decode(tokens)


def test_endless_garbage_is_not_held_back():
    """Bytes that never make a character are told all the same, or the window would grow without end."""
    tokenizer = tiny_lm().tokenizer
    half = tokenizer("é")["input_ids"][0]
    stream = TextStream(tokenizer)
    said = "".join(stream.add(half) for _ in range(100))
    assert len(said) >= 80 and len(stream.tokens) < 40


def test_the_end_of_text_ends_a_row_unless_it_is_to_be_ignored():
    lm = tiny_lm()
    after = lm.generate_ids([lm.encode("x")], 12)[0][4]
    for ends, finish in ((frozenset({after}), "stop"), (frozenset(), "length")):
        pieces: queue.Queue = queue.Queue()
        with running(lm) as engine:
            engine.submit([row(lm, "x", 12, pieces, ends=ends)])
            text, why = whole(pieces)
        assert why == finish and END not in text


def test_a_failed_step_ends_its_own_rows_alone(monkeypatch):
    lm, forward = tiny_lm(), Group._forward

    def broken(group: Group) -> torch.Tensor:
        if len(group.rows[0].prompt) > 100 and group.mask.shape[1] > 102:
            raise StropError("that is too much")
        return forward(group)

    monkeypatch.setattr(Group, "_forward", broken)
    good: queue.Queue = queue.Queue()
    bad: queue.Queue = queue.Queue()
    with running(lm) as engine:
        engine.submit([row(lm, "y" * 101, 30, bad), row(lm, "x", 30, good)])
        assert whole(bad)[1] == "error"
        assert whole(good)[0] == lm.generate(["x"], 30)[0]
        assert engine.alive and engine.wait_idle(10)


def test_a_new_request_gets_a_token_while_a_long_one_runs():
    lm = tiny_lm()
    with running(lm) as engine:
        long: queue.Queue = queue.Queue()
        first = row(lm, PROMPTS[0], 3000, long, ends=frozenset())
        engine.submit([first])
        long.get(timeout=20)
        short: queue.Queue = queue.Queue()
        engine.submit([row(lm, PROMPTS[1], 5, short)])
        assert whole(short)[1] in ("stop", "length")
        assert first.finish is None
        engine.cancel([first])
        assert engine.wait_idle(10)
    assert first.tokens < 3000


def test_groups_are_of_similar_length_and_the_oldest_is_among_them():
    engine = Engine(tiny_lm(), "tiny")
    ignored = partial(dict)
    sizes = [100, 500, 90, 104, 3000, 110]
    rows = [Row([1] * size, 1, None, TextStream(engine.lm.tokenizer), frozenset(), ignored) for size in sizes]
    engine.submit(rows)
    taken = engine._admit()
    assert taken[0] is rows[0]
    assert sorted(len(one.prompt) for one in taken) == [90, 100, 104, 110]
    assert [len(one.prompt) for one in engine.waiting] == [500, 3000]
    assert max(sizes) - min(sizes) > SHORT


def test_a_listener_that_is_gone_stops_its_row():
    lm = tiny_lm()

    def closed(piece: Piece) -> None:
        raise RuntimeError("Event loop is closed")

    one = Row(lm.encode("x"), 500, None, TextStream(lm.tokenizer), frozenset(), closed)
    with running(lm) as engine:
        engine.submit([one])
        assert engine.wait_idle(10)
    assert one.tokens < 500


def test_cost_aware_trees_are_served_too():
    lm = tiny_lm().with_(decode=CaDDTree(drafter="ngram"))
    assert Engine(lm, "tiny").alone
