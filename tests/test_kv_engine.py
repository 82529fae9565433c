"""The engine: interleaved, evicted, preempted or damaged, requests write what they would alone."""

import random
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from conftest import tiny_model
from paging import CODEC, Chosen, dense_answer, text
from transformers import LogitsProcessorList

from strop.core.chunks import Fixed, Shrinking
from strop.core.errors import StropError
from strop.core.sampling import KeyedSampler
from strop.kv.engine import Engine
from strop.kv.pages import PagedStore
from strop.kv.requests import Document, Request

NAME, PAGE = "qwen3", 8


class Ticks:
    """A clock that only a step moves, by a second."""

    def __init__(self) -> None:
        self.now, self.steps = 0.0, list[list[int]]()

    def __call__(self) -> float:
        return self.now


def engine(pages: int, chunks=None, **options) -> Engine:
    """An engine whose steps take a second each and are noted: tokens of each share."""
    model, clock = tiny_model(NAME), Ticks()
    found = Engine(model, PagedStore(model, pages, PAGE, **options), chunks, clock)
    compute = found.lm

    def timed(shares):
        clock.steps.append([len(share.tokens) for share in shares])
        clock.now += 1.0
        return compute(shares)

    timed.model = compute.model
    found.lm = timed
    return found


def document(engine: Engine, tokens: Sequence[int]) -> Document:
    return Document(tuple(tokens), tuple(engine.store.blocks(tokens)))


@cache
def alone(prompt: tuple[int, ...], count: int, seed: int | None = None) -> list[int]:
    """What transformers writes."""
    noise = [] if seed is None else [KeyedSampler(seed, [0], [0])]
    found = tiny_model(NAME, "sdpa").generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        logits_processor=LogitsProcessorList(noise),
    )
    return found[0, len(prompt) :].tolist()


@cache
def behind(documents: tuple[tuple[int, ...], ...], query: tuple[int, ...], count: int) -> list[int]:
    """What dense attention under the documents' mask writes."""
    written: list[int] = []
    for _ in range(count):
        written.append(int(dense_answer(NAME, documents, [*query, *written])[-1].argmax()))
    return written


def settled(engine: Engine) -> None:
    """Nothing is held, and all counts are right."""
    assert not engine.running and not engine.waiting and engine.store.residency.used == 0
    engine.store.check()


class TestManyRequests:
    def test_they_write_what_each_would_alone_though_pages_run_out(self):
        lm = engine(pages=14, chunks=Fixed(24))
        requests = [Request(text(10 + 7 * seed % 30, seed), 20 + seed) for seed in range(8)]
        for request in requests:
            lm.submit(request)
            lm.step()
        lm.run()
        for request in requests:
            assert request.output == alone(tuple(request.prompt), request.max_new_tokens)
        assert sum(request.preemptions for request in requests) > 2
        assert sum(request.recomputed_tokens for request in requests) > 0
        settled(lm)

    def test_the_head_of_the_queue_waits_for_pages_and_others_behind_it(self):
        lm = engine(pages=8)
        first, large, small = Request(text(40, 1), 3), Request(text(30, 2), 2), Request(text(5, 3), 2)
        for request in (first, large, small):
            lm.submit(request)
        lm.step()
        assert lm.running == [first] and list(lm.waiting) == [large, small]
        lm.run()
        assert first.ended < large.first <= small.first
        settled(lm)

    def test_times_and_chunks_are_those_of_the_steps(self):
        lm = engine(pages=32, chunks=Fixed(16))
        first, second = Request(text(37, 1), 4), Request(text(20, 2), 3)
        lm.submit(first)
        lm.step()
        lm.submit(second)
        lm.run()
        # 16; 16; then 5 and a page of the second, since two would be 21 tokens; 12 beside a decode
        assert lm.clock.steps == [[16], [16], [5, 8], [1, 12], [1, 1], [1, 1]]
        found, other = first.answer(None), second.answer(None)
        assert (found.ttft_s, found.tpot_s, found.computed_tokens, found.reused_tokens) == (3, 1, 37, 0)
        assert (other.ttft_s, other.tpot_s, other.computed_tokens) == (3, 1, 20)
        settled(lm)

    def test_chunks_shrink_where_many_decode(self):
        lm = engine(pages=64, chunks=Shrinking(base=64, threshold=1, floor=8))
        for seed in range(4):
            lm.submit(Request(text(8, seed), 12))
        lm.step()
        lm.submit(Request(text(60, 9), 1))
        lm.step()
        assert lm.clock.steps == [[8] * 4, [1, 1, 1, 1, 16]]

    def test_the_same_prompt_is_computed_once_even_in_one_step(self):
        lm = engine(pages=32)
        requests = [Request(text(37, 1), 30) for _ in range(3)]
        for request in requests:
            lm.submit(request)
        lm.run()
        assert lm.clock.steps[0] == [37, 5, 5]
        assert [request.reused_tokens for request in requests] == [0, 32, 32]
        assert {tuple(request.output) for request in requests} == {tuple(alone(tuple(text(37, 1)), 30))}
        assert lm.store.residency.cached == 8, "pages that fill alike are one"
        settled(lm)

    def test_sampling_is_that_of_keyed_noise(self):
        lm = engine(pages=32)
        requests = [Request(text(11, seed), 9, sampler=KeyedSampler(seed, [0], [0])) for seed in range(3)]
        lm.finish(requests)
        for seed, request in enumerate(requests):
            assert request.output == alone(tuple(request.prompt), 9, seed) != alone(tuple(request.prompt), 9)

    def test_a_token_that_ends_the_text_ends_it(self):
        lm, prompt = engine(pages=32), text(11, 1)
        whole = alone(tuple(prompt), 12)
        request = Request(prompt, 12, ends=frozenset([whole[3]]))
        lm.finish([request])
        assert request.output == whole[: whole.index(whole[3]) + 1]


class TestHoles:
    def test_what_is_lost_amid_a_prompt_is_all_that_is_computed(self):
        evictor = Chosen()
        lm = engine(pages=16, chunks=Fixed(16), evictor=evictor)
        prompt = text(80, 1)
        lm.finish([Request(prompt, 4)])
        blocks = lm.store.blocks(prompt)
        evictor.order = [blocks[at] for at in (2, 3, 7)]
        free = lm.store.residency.free - lm.store.residency.cached
        lease = lm.store.acquire([], free + 3, lm.clock())
        lm.store.release([], lease.anonymous, lm.clock())
        lm.clock.steps.clear()
        again = Request(prompt, 4)
        lm.finish([again])
        assert again.output == alone(tuple(prompt), 4)
        assert lm.clock.steps[:2] == [[16], [16]], "two pages, then one and the last, each at once"
        assert (again.computed_tokens, again.recomputed_tokens, again.reused_tokens) == (32, 24, 48)
        settled(lm)


class TestTrouble:
    def test_a_page_that_changed_is_not_served_and_its_readers_compute_it_again(self):
        lm, prompt = engine(pages=32), text(40, 1)
        first, second = Request(prompt, 20), Request(prompt, 5)
        lm.submit(first)
        for _ in range(4):
            lm.step()
        lm.store.pool.values[1][first.held.pages[1], 0, 3, 2] += 1.0
        lm.finish([second])
        assert first.preemptions == 1 and first.computed_tokens + second.computed_tokens >= 40 + 8 + 8
        assert first.output == alone(tuple(prompt), 20) and second.output == alone(tuple(prompt), 5)
        settled(lm)

    def test_after_a_step_that_failed_all_goes_on(self):
        lm = engine(pages=32, chunks=Fixed(16))
        compute, requests = lm.lm, [Request(text(30 + seed, seed), 6) for seed in range(3)]
        for request in requests:
            lm.submit(request)
        for _ in range(3):
            lm.step()

        def broken(shares):
            raise KeyboardInterrupt

        lm.lm = broken
        with pytest.raises(KeyboardInterrupt):
            lm.step()
        lm.lm = compute
        assert list(lm.waiting) == requests
        lm.cancel(requests[1])
        lm.run()
        for request in (requests[0], requests[2]):
            assert request.output == alone(tuple(request.prompt), 6)
        settled(lm)

    def test_too_few_pages_of_16_bits_are_said_and_nothing_stays_behind(self):
        lm = engine(pages=20, codec=CODEC, open_pages=2)
        with pytest.raises(StropError, match=r"keeps 2 pages in 16 bits, .* and the store has 2 of them"):
            lm.finish([Request(text(45, 1), 3)])
        settled(lm)
        lm.finish([Request(text(5, 1), 3)])

    @pytest.mark.parametrize(
        ("request_of", "words"),
        [
            (lambda lm: Request([], 3), "a prompt of no tokens"),
            (lambda lm: Request([1], 0), "nor one by none"),
            (lambda lm: Request([], 0), "a request of nothing"),
            (lambda lm: Request([1], 4096), "exceed the 4096 that this model was made for"),
            (lambda lm: Request([1] * 70, 12), "needs 11 pages of 8 tokens and the store has 10"),
            (lambda lm: Request([1], 1, [document(lm, text(73, 0))]), "needs 11 pages"),
        ],
    )
    def test_what_could_not_be_served_alone_is_refused(self, request_of, words):
        lm = engine(pages=10)
        with pytest.raises(StropError, match=words):
            lm.submit(request_of(lm))
        settled(lm)

    def test_a_request_runs_once(self):
        lm, request = engine(pages=10), Request([1, 2], 3)
        lm.submit(request)
        for step in (lambda: None, lm.step, lm.run):
            step()
            with pytest.raises(StropError, match="runs once"):
                lm.submit(request)
        assert len(request.output) == 3
        settled(lm)

    def test_a_store_is_of_one_model(self):
        with pytest.raises(StropError, match="keys and values of another model"):
            Engine(tiny_model("llama"), PagedStore(tiny_model("qwen3"), 8, PAGE))

    def test_pages_that_others_hold_are_not_waited_for(self):
        lm = engine(pages=8)
        lm.store.acquire([], 4, 0.0)
        with pytest.raises(StropError, match="others hold pages"):
            lm.finish([Request(text(40, 1), 3)])


class TestWorkload:
    @pytest.mark.parametrize("seed", range(6))
    def test_any_mixture_is_served_exactly_and_leaves_nothing_behind(self, seed):
        draw = random.Random(seed)
        lm = engine(pages=draw.choice([16, 20, 40]), chunks=Fixed(draw.choice([4, 16, 50])))
        texts = [tuple(text(draw.randint(1, 30), 10 * seed + i)) for i in range(4)]
        requests = []
        for _ in range(10):
            chosen = tuple(draw.choices(texts, k=draw.randint(0, 3)))
            query = tuple(text(draw.randint(1, 20), draw.randint(0, 2)))
            documents = [document(lm, tokens) for tokens in chosen]
            requests.append((Request(query, draw.randint(1, 12), documents), chosen))
        for request, _ in requests:
            lm.submit(request)
            for _ in range(draw.randint(0, 3)):
                lm.step()
                lm.store.check()
        lm.run()
        for request, chosen in requests:
            wanted = behind(chosen, tuple(request.prompt), request.max_new_tokens)
            assert request.output == wanted
        settled(lm)

    @pytest.mark.parametrize("open_pages", [6, 10, 30])
    def test_open_pages_that_are_few_make_requests_wait_and_chunks_short(self, open_pages):
        """Two of a document of 13 tokens, one of one of 16, two of a request's own: one request takes 5."""
        lm = engine(pages=60, codec=CODEC, open_pages=open_pages)
        documents = [document(lm, text(length, length)) for length in (13, 16)]
        requests = [Request(text(50 + seed, seed), 20, documents) for seed in range(5)]
        for request in requests:
            lm.submit(request)
        together = 0
        while lm.running or lm.waiting:
            lm.step()
            lm.store.check()
            together = max(together, len(lm.running))
        assert [len(request.output) for request in requests] == [20] * 5
        assert together == {6: 1, 10: 1, 30: 5}[open_pages]
        assert all(sum(step) <= PAGE * open_pages for step in lm.clock.steps)
        assert not any(request.preemptions for request in requests)
        settled(lm)

    def test_packed_pages_serve_as_well_and_are_packed_once(self):
        lm = engine(pages=40, chunks=Fixed(16), codec=CODEC, open_pages=12)
        prompts = [text(40 + seed, seed) for seed in range(3)]
        requests = [Request(prompt, 12) for prompt in prompts for _ in range(2)]
        lm.finish(requests[::2])
        assert lm.store.pool.coded.sum() >= 3 * 4
        lm.finish(requests[1::2])
        assert [request.reused_tokens for request in requests[1::2]] == [32, 40, 40]
        settled(lm)


@pytest.mark.parametrize("open_pages", (3, 7, 9))
def test_a_request_whose_names_are_another_s_waits_for_open_pages_as_well(open_pages):
    alone, new = engine(pages=80, codec=CODEC, open_pages=40), 150
    whole = Request(text(20, 3), new)
    alone.finish([whole])
    lm = engine(pages=80, codec=CODEC, open_pages=open_pages, chunks=Fixed(PAGE))
    first, between = Request(text(20, 3), new), Request(text(300, 77), 2)
    lm.submit(first)
    for _ in range(5):
        lm.step()
    behind = Request(whole.tokens[:160], 4)
    lm.submit(between)
    lm.submit(behind)
    lm.run()
    assert [len(one.output) for one in (first, between, behind)] == [new, 2, 4]
    assert behind.preemptions > 0 or open_pages == 3
    lm.store.check()
