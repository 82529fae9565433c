"""Every row ends once and is counted once, whichever of its client, its text and the server ends it."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from serving import metric, row, running, tiny_lm, whole

from strop.decode import PromptLookup
from strop.server import alone
from strop.server.engine import Engine
from strop.server.group import Group
from strop.server.limits import Limits
from strop.server.row import Row

ENDS = ("stop", "length", "abort", "error")
SECONDS = 20


def ended(engine: Engine) -> dict[str, float]:
    """Rows by why they ended."""
    counts = {why: metric(engine, "vllm:request_success_total", finished_reason=why) for why in ENDS}
    return {why: count for why, count in counts.items() if count}


class Halt:
    """A method that stops at its end until it is let go."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method, self.inside, self.go = method, threading.Event(), threading.Event()

    def __get__(self, owner: Any, kind: Any = None) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            result = self.method(owner, *values)
            self.inside.set()
            assert self.go.wait(SECONDS)
            return result

        return call


@pytest.mark.parametrize("most", [1, 5])
def test_a_row_that_is_cancelled_in_a_step_ends_once_and_writes_nothing(monkeypatch, most):
    lm, pieces = tiny_lm(), queue.Queue()
    halt = Halt(Group._forward)
    monkeypatch.setattr(Group, "_forward", halt)
    with running(lm) as engine:
        one = row(lm, "x", most, pieces, ends=frozenset())
        engine.submit([one])
        assert halt.inside.wait(SECONDS)
        engine.cancel([one])
        engine.cancel([one])
        halt.go.set()
        assert engine.wait_idle(SECONDS)
        assert ended(engine) == {"abort": 1}
        assert metric(engine, "vllm:generation_tokens_total") == one.tokens == 0
        assert metric(engine, "vllm:e2e_request_latency_seconds_count") == 0
    assert pieces.empty() and one.finish == "abort"


def test_a_row_that_ended_is_not_cancelled():
    lm, pieces = tiny_lm(), queue.Queue()
    with running(lm) as engine:
        one = row(lm, "x", 3, pieces, ends=frozenset())
        engine.submit([one])
        whole(pieces)
        engine.cancel([one])
        assert engine.wait_idle(SECONDS)
        assert ended(engine) == {"length": 1} and one.finish == "length"


def slowly_over(one: Row) -> bool:
    """Whether a row is over, told late enough for another thread to come between."""
    over = one.finish is not None
    time.sleep(1e-4)
    return over


def test_ends_that_race_are_one(monkeypatch):
    """Many threads end the same rows; each row has one end, and the first is kept."""
    lm, counts = tiny_lm(), []
    monkeypatch.setattr(Row, "over", property(slowly_over))
    rows = [row(lm, "x", 1, queue.Queue(), ends=frozenset(), ended=counts.append) for _ in range(100)]
    start = threading.Barrier(3)

    def each(end: Callable[[Any], None]) -> None:
        start.wait(SECONDS)
        for one in rows:
            end(one)

    ends = (lambda one: one.take([5]), lambda one: one.cancel(), lambda one: one.fail("no"))
    threads = [threading.Thread(target=each, args=[end]) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counts) == sorted(one.finish for one in rows)


@pytest.mark.parametrize("decode", [None, PromptLookup()])
def test_a_row_that_was_admitted_is_running_and_closing_waits_for_it(monkeypatch, decode):
    lm, pieces = tiny_lm().with_(decode=decode), queue.Queue()
    halt = Halt(Engine._admit)
    monkeypatch.setattr(Engine, "_admit", halt)
    engine = Engine(lm, "tiny")
    engine.start()
    engine.submit([row(lm, "x", 5, pieces, ends=frozenset())])
    assert halt.inside.wait(SECONDS)
    assert engine.running == 1 and not engine.wait_idle(0)
    closing = threading.Thread(target=engine.close, args=[SECONDS])
    closing.start()
    halt.go.set()
    closing.join(SECONDS)
    assert whole(pieces)[1] == "length" and ended(engine) == {"length": 1}


def test_closing_ends_and_counts_all_rows(monkeypatch):
    """One row amid its step, one that waits; both hear of it."""
    lm, told = tiny_lm(), [queue.Queue(), queue.Queue()]
    halt = Halt(Group._forward)
    monkeypatch.setattr(Group, "_forward", halt)
    engine = Engine(lm, "tiny", Limits(batch=1))
    engine.start()
    engine.submit([row(lm, "x", 50, pieces) for pieces in told])
    assert halt.inside.wait(SECONDS)
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert [whole(pieces) for pieces in told] == [("the server stopped", "error")] * 2
    halt.go.set()
    closing.join(SECONDS)
    assert ended(engine) == {"abort": 2}
    assert engine.running == 0 and not engine.waiting


def test_a_text_that_generate_cuts_off_fails(monkeypatch):
    lm, cut, good = tiny_lm().with_(decode=PromptLookup()), queue.Queue(), queue.Queue()
    with running(lm) as engine:
        monkeypatch.setattr(lm.model.generation_config, "max_time", 1e-6)
        engine.submit([row(lm, "ab ab ab", 24, cut, ends=frozenset())])
        text, why = whole(cut)
        assert "max_time" in text and why == "error"
        monkeypatch.setattr(lm.model.generation_config, "max_time", None)
        engine.submit([row(lm, "ab ab ab", 24, good, ends=frozenset())])
        assert whole(good)[1] == "length" and engine.wait_idle(SECONDS)
        assert ended(engine) == {"error": 1, "length": 1}


def test_a_row_written_alone_has_a_cache_and_a_latency_each_round(monkeypatch):
    lm, pieces, rounds, held = tiny_lm().with_(decode=PromptLookup()), queue.Queue(), [], []
    put = alone._Listener.put

    def counted(listener: Any, value: Any) -> None:
        rounds.append(value.numel() if listener.begun else 0)
        put(listener, value)
        held.append(metric(engine, "strop:kv_cache_bytes"))

    monkeypatch.setattr(alone._Listener, "put", counted)
    with running(lm) as engine:
        engine.submit([row(lm, "ab ab ab", 60, pieces, ends=frozenset())])
        whole(pieces)
        assert engine.wait_idle(SECONDS)
        assert metric(engine, "strop:kv_cache_bytes") == 0
        assert metric(engine, "vllm:generation_tokens_total") == 60
        assert sum(rounds) >= 60 and max(rounds) > 1
        assert metric(engine, "vllm:inter_token_latency_seconds_count") == len(rounds) - 2
    key_and_value = 2 * 2 * 2 * 16 * 4  # tensors, layers, heads, channels, bytes
    assert held[1] >= key_and_value * len("ab ab ab")
