"""Pages that are shared, evicted, packed and checked: what is served is what was written for that block."""

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from paging import CODEC, Chosen, add_documents, paged, question, text

from strop.core.blocks import Run
from strop.core.errors import StropError
from strop.core.evict.lru import LRU
from strop.kv.paged import PagedModel, Segment, Share
from strop.kv.pages import PagedStore

TRUNK = text(40, 0)
CHAINS = [TRUNK[:length] + text(24, seed) for seed, length in enumerate((0, 8, 8, 24))]
"""Texts of which some begin alike."""
KINDS = ("acquire", "release", "write", "adopt")
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 7), st.integers(0, 5)), max_size=25)


@cache
def content(block: int) -> torch.Tensor:
    """A block's keys and values `[2, H_kv, page, D]`."""
    return torch.randn(2, 2, 8, 16, generator=torch.Generator().manual_seed(block % 2**31))


@cache
def record(block: int) -> torch.Tensor:
    return CODEC.encode(*content(block))


class Session:
    """Requests that come and go on a small store, each block filled with numbers of its own."""

    def __init__(self, codec, evictor) -> None:
        self.store = PagedStore(tiny_model("qwen3"), 12, 8, evictor, codec, open_pages=4 if codec else 0)
        self.held: list[tuple[list[int], list[int], list[int]]] = []
        """Of each request its chain, the blocks of it that it holds, and its pages without a name."""
        self.now = 0.0

    def run(self, steps) -> None:
        for kind, which, count in steps:
            self.now += 1.0
            if kind == "acquire" or self.held:
                getattr(self, kind)(which, count)
            self.check()

    def acquire(self, which: int, count: int) -> None:
        chain = self.store.blocks(CHAINS[which % len(CHAINS)])
        blocks = chain[: min(count, len(chain))]
        before = self.store.runs(blocks)
        assert self.store.match(blocks) == before
        if lease := self.store.acquire(blocks, which % 3, self.now):
            self.held.append((chain, blocks, lease.anonymous))
        else:
            assert self.store.residency.free < len(blocks) + which % 3

    def release(self, which: int, count: int) -> None:
        _, blocks, anonymous = self.held.pop(which % len(self.held))
        self.store.release(blocks, anonymous, self.now)

    def write(self, which: int, count: int) -> None:
        _, blocks, _ = self.held[which % len(self.held)]
        run = next((run for run in self.store.runs(blocks) if not run.resident), None)
        if run is None:
            return
        pages = [self.store._page[block] for block in blocks[run.start : run.stop]]
        try:
            rows = self.store.open(np.array(pages))
        except StropError:
            assert len(pages) > self.store.pool.open_rows and not self.store.residency.cached
            return
        for row, block in zip(rows, blocks[run.start : run.stop], strict=True):
            self.fill(row, block)
        self.store.seal(blocks[run.start : run.stop], run.start, [8] * (run.stop - run.start))

    def adopt(self, which: int, count: int) -> None:
        chain, blocks, anonymous = self.held[which % len(self.held)]
        if not anonymous or len(blocks) == len(chain) or not all(map(self.store.sealed, blocks)):
            return
        block = chain[len(blocks)]
        if self.store.pool.codec and not self.store.pool.open_rows:
            return  # its 16-bit page was never opened
        self.fill(self.store.open(np.array(anonymous[:1]))[0], block)
        was_sealed = self.store.sealed(block)
        page = self.store.adopt(anonymous[0], block, self.now)
        if page is None:
            assert block in self.store.residency and not was_sealed
            return
        anonymous.pop(0)
        blocks.append(block)
        assert page == self.store._page[block]
        self.store.seal([block], len(blocks) - 1, [8])

    def fill(self, row: int, block: int) -> None:
        for layer in range(2):
            self.store.pool.keys[layer][row], self.store.pool.values[layer][row] = content(block)

    def check(self) -> None:
        """All invariants, and every sealed block has its own numbers."""
        self.store.check()
        pool = self.store.pool
        for block, page in self.store._page.items():
            if not self.store.sealed(block):
                continue
            if pool.coded[page]:
                assert torch.equal(pool.records[1][page], record(block))
            else:
                assert torch.equal(pool.keys[1][pool.row[page]], content(block)[0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(steps=STEPS)
@pytest.mark.parametrize(("codec", "evictor"), [(None, LRU), (CODEC, Chosen)])
def test_whatever_comes_and_goes_a_sealed_block_holds_what_was_written_for_it(codec, evictor, steps):
    Session(codec, evictor()).run(steps)


class TestNames:
    def test_a_name_covers_all_before_it_and_the_documents_in_their_order(self):
        store = paged("qwen3").store
        one, other = store.blocks(TRUNK), store.blocks([60, *TRUNK[1:]])
        assert store.blocks(TRUNK[:24]) == one[:3] and not set(one) & set(other)
        assert len(set(one)) == 5 and all(0 < block < 2**63 for block in one)
        documents = [store.blocks(tokens) for tokens in CHAINS[:2]]
        seeds = {store.seed(documents), store.seed(documents[::-1]), store.seed(documents[:1]), 0}
        assert len(seeds) == 4
        assert len({store.blocks(TRUNK, seed)[0] for seed in seeds}) == 4

    def test_a_short_block_is_not_the_beginning_of_a_longer_one(self):
        store = paged("qwen3").store
        assert store.blocks(TRUNK[:11])[1] != store.blocks(TRUNK[:16])[1]

    def test_models_and_page_sizes_do_not_share_names(self):
        stores = [paged("qwen3").store, paged("qwen3", page=16).store, paged("llama").store]
        assert len({store.blocks(TRUNK[:8])[0] for store in stores}) == 3
        assert paged("qwen3").store.blocks(TRUNK) == stores[0].blocks(TRUNK)


class TestAdoption:
    """A request decodes the block behind `CHAINS[0][:16]`; somebody else may have been there before."""

    def begin(self, codec=None):
        lm = paged("qwen3", pages=12, codec=codec, open_pages=6 if codec else 0)
        chain = lm.store.blocks(TRUNK)
        lease = lm.store.acquire(chain[:2], 1, 0.0)
        pages = lease.named + lease.anonymous
        lm([Share(TRUNK[:24], range(24), [Segment(pages, 0, 24)], ())])
        lm.store.seal(chain[:2], 0, [8, 8])
        return lm, chain, lease.anonymous[0]

    def test_a_new_name(self):
        lm, chain, page = self.begin()
        assert lm.store.adopt(page, chain[2], 1.0) == page
        lm.store.seal([chain[2]], 2, [8])
        lm.store.release(chain[:3], [], 2.0)
        assert lm.store.match(chain[:3]) == [Run(0, 3, True)]
        lm.store.check()

    def test_a_block_that_is_sealed_elsewhere_is_shared(self):
        lm, chain, page = self.begin()
        pages = lm.store.acquire(chain[:3], 0, 1.0).named
        lm([Share(TRUNK[16:24], range(16, 24), [Segment(pages, 0, 24)], ())])
        lm.store.seal([chain[2]], 2, [8])
        free = lm.store.residency.free
        assert lm.store.adopt(page, chain[2], 2.0) == pages[2] != page
        assert lm.store.residency.free == free + 1
        lm.store.check()

    def test_a_block_that_another_is_about_to_write_is_left_to_it(self):
        lm, chain, page = self.begin()
        lm.store.acquire(chain[:3], 0, 1.0)
        assert lm.store.adopt(page, chain[2], 2.0) is None
        lm.store.release(chain[:2], [page], 3.0)
        lm.store.check()

    @pytest.mark.parametrize("codec", [None, CODEC])
    def test_a_block_that_was_given_up_unwritten_is_taken_over(self, codec):
        lm, chain, page = self.begin(codec)
        rows = lm.store.pool.open_rows
        other = lm.store.acquire(chain[:3], 0, 1.0).named[2]
        lm.store.open(np.array([other]))
        lm.store.release(chain[:3], [], 2.0)
        assert lm.store.pool.open_rows == rows
        assert lm.store.adopt(page, chain[2], 3.0) == page
        lm.store.check()


class TestRefusals:
    def test_a_store_serves_the_model_that_it_was_made_for(self):
        store = paged("qwen3").store
        store.require_model(paged("qwen3").model)
        with pytest.raises(StropError, match="of another model"):
            PagedModel(paged("llama").model, store)
        tuned = deepcopy(paged("qwen3").model)
        tuned.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-3
        with pytest.raises(StropError, match="of another model"):
            PagedModel(tuned, store)

    @pytest.mark.parametrize(("name", "sentence"), [("gemma2", "sliding window"), ("gpt2", "no one rotary")])
    def test_models_whose_keys_cannot_be_moved(self, name, sentence):
        with pytest.raises(StropError, match=sentence):
            paged(name)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"page": 12}, "choose one of"),
            ({"page": 16, "codec": CODEC, "open_pages": 4}, "packs 8 tokens a tile and a page holds 16"),
            ({"page": 8, "codec": CODEC, "open_pages": 0}, "open_pages from 1"),
            ({"page": 8, "codec": CODEC, "open_pages": 9}, "open_pages from 1 to 8, not 9"),
            ({"page": 8, "pages": 0}, "holds nothing"),
        ],
    )
    def test_sizes_that_do_not_fit(self, options, sentence):
        with pytest.raises(StropError, match=sentence):
            PagedStore(tiny_model("qwen3"), **{"pages": 8} | options)

    def test_contexts_beyond_the_model_and_segments_cut_for_another_page_size(self):
        lm = paged("qwen3")
        page = lm.store.acquire([], 1, 0.0).anonymous
        for segment, sentence in (
            (Segment(page, 4090, 8), "beyond the 4096"),
            (Segment(page, 0, 8, 5000), "beyond the 4096"),
            (Segment(page, 0, 9), "9 tokens take 2 pages of 8"),
        ):
            with pytest.raises(StropError, match=sentence):
                lm([Share([5], [segment.start], [segment])])

    def test_tokens_without_an_open_page_of_their_own(self):
        lm = paged("qwen3")
        [document] = add_documents(lm, [TRUNK[:16]])
        for at, segments, sentence in (
            (3, [document.at(0)], "never written again"),
            (21, [document.at(16)], "outside the request's own"),
            (40, [document.at(0)], "outside the request's own"),
            (17, [document.at(0), document.at(8)], "must ascend"),
        ):
            with pytest.raises(ValueError, match=sentence):
                lm([Share([5], [at], segments)])


class TestDamage:
    @pytest.mark.parametrize("codec", [None, CODEC])
    @pytest.mark.parametrize("block", [0, 1, 2])
    def test_a_page_that_changed_is_never_served(self, codec, block):
        lm = paged("qwen3", codec=codec, open_pages=8 if codec else 0)
        store = lm.store
        [document] = add_documents(lm, [TRUNK[:21]])
        clean = lm([question(lm, [document], TRUNK[:3])])
        page = document.lease.named[block]
        pool, where = store.pool, store.pool.row[page]
        data = pool.records[1][page] if pool.coded[page] else pool.values[1][where].view(torch.uint8)
        data[1, ..., 3] ^= 4
        with pytest.raises(ValueError, match="has changed"):
            store.check()
        runs = [Run(0, block, True), Run(block, block + 1, False), Run(block + 1, 3, True)]
        assert store.match(document.blocks) == [run for run in runs if run.start < run.stop]
        at = range(8 * block, min(8 * block + 8, 21))
        lm([Share(TRUNK[at.start : at.stop], at, [document.at(0)], ())])
        store.seal(document.blocks[block : block + 1], block, [len(at)])
        store.check()
        assert store.match(document.blocks) == [Run(0, 3, True)]
        if codec is None:
            again = lm([question(lm, [document], TRUNK[:3])])
            torch.testing.assert_close(again, clean, rtol=0, atol=1e-5)

    def test_what_lies_beyond_a_short_page_is_not_part_of_it(self):
        lm = paged("qwen3")
        [document] = add_documents(lm, [TRUNK[:21]])
        lm.store.pool.keys[0][document.lease.named[-1], :, 5:] = 7.0
        assert lm.store.match(document.blocks) == [Run(0, 3, True)]

    def test_slots_that_changed_places_are_noticed(self):
        lm = paged("qwen3")
        [document] = add_documents(lm, [TRUNK[:16]])
        keys = lm.store.pool.keys[1][document.lease.named[1]]
        keys[:, [2, 5]] = keys[:, [5, 2]]
        assert lm.store.match(document.blocks) == [Run(0, 1, True), Run(1, 2, False)]
