"""Steps over pages: documents anywhere, holes anywhere, mixed batches, all equal to dense attention."""

import os
import random
from itertools import pairwise

import pytest
import torch
from paging import CODEC, Chosen, add_documents, dense_answer, dense_model, paged, question, text, valid
from torch import Tensor

from strop.core.errors import StropError
from strop.kernels.paged_flex import attend as by_flex
from strop.kv.paged import PagedModel, Segment, Share

PATTERNS = 500 if os.environ.get("STROP_SOAK") == "1" else 60
TEXTS = [text(length, seed) for seed, length in enumerate((13, 21, 5))]
QUERY = text(7, 9)
LONG = text(40, 0)
every_model = pytest.mark.parametrize("name", ["llama", "qwen3", "interleaved", "partial interleaved"])


def near(found: Tensor, wanted: Tensor, bound: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=bound)


def same(found: Tensor, wanted: Tensor, among: Tensor) -> None:
    """To 1e-5 of the largest number `among` all of its kind: logits reach 6 here, and dense attention in
    float32 is itself 1.7e-5 from float64."""
    near(found, wanted, 1e-5 * among.abs().max().item())


def pool_bytes(lm: PagedModel) -> list[bytes]:
    pool = lm.store.pool
    return [x.numpy().tobytes() for x in (*pool.keys, *pool.values, *pool.records)]


class TestDocuments:
    @every_model
    @pytest.mark.parametrize("page", [8, 16, 64])
    def test_moved_documents_are_those_of_a_dense_pass_with_their_mask(self, name, page):
        lm = paged(name, page=page)
        documents = add_documents(lm, TEXTS)
        near(lm([question(lm, documents, QUERY)]), dense_answer(name, TEXTS, QUERY), 1e-4)
        lm.store.check()

    def test_flex_attention_serves_as_well(self):
        lm = paged("qwen3", function=by_flex)
        documents = add_documents(lm, TEXTS)
        near(lm([question(lm, documents, QUERY)]), dense_answer("qwen3", TEXTS, QUERY), 1e-4)

    def test_any_order_in_one_batch_reads_the_same_pages_and_writes_none_of_them(self):
        lm = paged("qwen3")
        documents = add_documents(lm, TEXTS)
        shared = {page for document in documents for page in document.lease.named}
        before = pool_bytes(lm)
        orders = [(0, 1, 2), (2, 0), (1, 2, 0)]
        shares = [question(lm, [documents[index] for index in order], QUERY) for order in orders]
        shifts = [share.segments[order.index(2)].shift for share, order in zip(shares, orders, strict=True)]
        assert shifts == [34, 0, 21]
        found = lm(shares).split(len(QUERY))
        for order, logits in zip(orders, found, strict=True):
            near(logits, dense_answer("qwen3", [TEXTS[index] for index in order], QUERY), 1e-4)
        own = {page for share in shares for page in share.segments[-1].pages}
        assert not own & shared
        for tensor, old in zip(lm.store.pool.keys + lm.store.pool.values, before, strict=True):
            then = torch.frombuffer(bytearray(old), dtype=tensor.dtype).view(tensor.shape)
            assert (tensor[list(shared)] == then[list(shared)]).all() and not (tensor == then).all()
        lm.store.check()

    @pytest.mark.parametrize("garbage", [1e4, torch.nan])
    def test_what_lies_in_slots_that_do_not_count_changes_nothing(self, garbage):
        lm = paged("qwen3", page=16)
        documents = add_documents(lm, TEXTS)
        clean = lm([question(lm, documents, QUERY)])
        for document in documents:
            last, filled = document.lease.named[-1], len(document.tokens) % 16
            for pool in lm.store.pool.keys + lm.store.pool.values:
                pool[last, :, filled:] = garbage
        near(lm([question(lm, documents, QUERY)]), clean, 1e-6)
        lm.store.check()


class Recompute:
    """A text in a store that lost some of its blocks, beside another request that decodes."""

    def __init__(self, name: str, seed: int, function=None) -> None:
        self.random = random.Random(seed)
        self.name, self.evictor = name, Chosen()
        self.tokens = text(self.random.randint(20, 150), seed)
        self.other = text(self.random.randint(5, 40), seed + 1)
        self.full = (len(self.tokens) - 1) // 8
        self.lm = paged(name, pages=self.full + 12, page=8, evictor=self.evictor, function=function)
        self.store = self.lm.store
        self.blocks = self.store.blocks(self.tokens)[: self.full]
        self.pages = self.prefill(self.blocks)
        self.decoding = self.store.acquire([], 6, 1.0).anonymous
        self.decoded = len(self.other) // 2
        self.wanted_of_other = whole(name, self.other)[0]
        self.lm([self.share_of_other(range(self.decoded), ())])

    def prefill(self, blocks: list[int]) -> list[int]:
        """Compute the whole text once, seal and release it."""
        lease = self.store.acquire(blocks, 1, 0.0)
        pages = lease.named + lease.anonymous
        segments = [Segment(pages, 0, len(self.tokens))]
        self.lm([Share(self.tokens, range(len(self.tokens)), segments)])
        self.store.seal(blocks, 0, [8] * len(blocks))
        self.store.release(blocks, lease.anonymous, 1.0)
        return pages

    def share_of_other(self, at: range, outputs) -> Share:
        segments = [Segment(self.decoding, 0, 48)]
        return Share(self.other[at.start : at.stop], at, segments, outputs)

    def lose(self) -> list[int]:
        """Evict some runs of blocks and leave garbage where they were; which blocks."""
        count = min(self.random.randint(1, 8), self.full)
        starts = self.random.sample(range(self.full), count)
        holes = sorted({hole for start in starts for hole in range(start, min(start + 2, self.full))})
        self.evictor.order = [self.blocks[hole] for hole in holes]
        residency = self.store.residency
        lease = self.store.acquire([], residency.free - residency.cached + len(holes), 2.0)
        for pool in self.store.pool.keys + self.store.pool.values:
            pool[lease.anonymous] = torch.nan
        self.store.release([], lease.anonymous, 3.0)
        return holes

    def rebuild(self, holes: list[int]) -> list[tuple[int, Tensor]]:
        """Compute what is missing in chunks that cross pieces; each computed position and its logits."""
        lease = self.store.acquire(self.blocks, 1, 4.0)
        runs = self.store.match(self.blocks)
        assert [at for run in runs if not run.resident for at in range(run.start, run.stop)] == holes
        self.pages = lease.named + lease.anonymous
        todo = [place for hole in holes for place in range(8 * hole, 8 * hole + 8)]
        todo += range(8 * self.full, len(self.tokens))
        cuts = sorted({0, len(todo), *(self.random.randrange(len(todo)) for _ in range(2))})
        found = []
        for first, last in pairwise(cuts):
            places = todo[first:last]
            segments = [Segment(self.pages, 0, len(self.tokens))]
            share = Share([self.tokens[at] for at in places], places, segments, range(len(places)))
            other = self.share_of_other(range(self.decoded, self.decoded + 1), (-1,))
            logits = self.lm([other, share])
            same(logits[0], self.wanted_of_other[self.decoded], self.wanted_of_other)
            self.decoded += 1
            found += zip(places, logits[1:], strict=True)
        self.store.seal(self.blocks, 0, [8] * self.full)
        return found


def whole(name: str, tokens: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Dense causal attention: logits `[T, V]`, and keys and values `[T, H_kv, D]` of all layers."""
    with torch.no_grad():
        found = dense_model(name)(torch.tensor([tokens]), use_cache=True)
    layers = found.past_key_values.layers
    both = [layer.keys for layer in layers] + [layer.values for layer in layers]
    return found.logits[0], [x[0].transpose(0, 1) for x in both]


class TestPieces:
    @pytest.mark.parametrize("name", ["llama", "qwen3"])
    def test_any_pattern_of_holes_is_filled_as_dense_causal_attention_would(self, name):
        for pattern in range(PATTERNS // 2):
            case = Recompute(name, pattern)
            logits, both = whole(name, case.tokens)
            for place, row in case.rebuild(case.lose()):
                same(row, logits[place], logits)
            pool = case.store.pool
            for tensor, dense in zip(pool.keys + pool.values, both, strict=True):
                rebuilt = tensor[case.pages].transpose(1, 2).flatten(0, 1)[: len(case.tokens)]
                same(rebuilt, dense, dense)
            case.store.check()

    def test_flex_attention_fills_them_as_well(self):
        for pattern in range(3):
            case = Recompute("qwen3", pattern, by_flex)
            logits, _ = whole("qwen3", case.tokens)
            for place, row in case.rebuild(case.lose()):
                same(row, logits[place], logits)
            case.store.check()


class TestPacked:
    def stores(self, texts):
        """Documents packed, and the same in 16 bits with the numbers that packing left."""
        packed = paged("qwen3", codec=CODEC, open_pages=16)
        plain = paged("qwen3")
        both = [add_documents(lm, texts) for lm in (packed, plain)]
        source, target = packed.store.pool, plain.store.pool
        for one, other in zip(*both, strict=True):
            for page, to in zip(one.lease.named, other.lease.named, strict=True):
                for layer in range(2):
                    if source.coded[page]:
                        keys, values = CODEC.decode(source.records[layer][page], 16)
                    else:
                        row = source.row[page]
                        keys, values = source.keys[layer][row], source.values[layer][row]
                    target.keys[layer][to], target.values[layer][to] = keys, values
        return packed, plain, both

    def test_attention_on_codes_is_attention_on_the_decoded_pages(self):
        texts = [text(length, seed) for seed, length in enumerate((29, 16, 5, 43))]
        packed, plain, (coded, decoded) = self.stores(texts)
        assert packed.store.pool.coded.sum() == 2 + 1 + 0 + 4
        orders = [(0, 1, 2, 3), (3, 1), (2,)]
        found, wanted = (
            lm([question(lm, [documents[i] for i in order], text(7, 9)) for order in orders])
            for lm, documents in ((packed, coded), (plain, decoded))
        )
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        packed.store.check()

    def test_full_pages_behind_the_first_are_packed_and_their_rows_are_free(self):
        lm = paged("qwen3", pages=12, codec=CODEC, open_pages=4)
        store = lm.store
        blocks = store.blocks(LONG)
        pages = store.acquire(blocks, 0, 0.0).named
        for start in (0, 16, 32):
            at = range(start, min(start + 16, 40))
            lm([Share(LONG[at.start : at.stop], at, [Segment(pages, 0, 40)], ())])
            store.seal(blocks[start // 8 : at.stop // 8], start // 8, valid(len(at), 8))
            store.check()
        assert store.pool.coded[pages].tolist() == [False] + [True] * 4 and store.pool.open_rows == 3
        more = store.acquire([], 4, 1.0).anonymous
        with pytest.raises(StropError, match="more open_pages"):
            lm([Share(text(32, 3), range(32), [Segment(more, 0, 32)])])
        store.release([], more, 2.0)
        store.release(blocks, [], 3.0)
        lease = store.acquire([], 4, 4.0).anonymous
        lm([Share(text(32, 3), range(32), [Segment(lease, 0, 32)])])
        assert not store.sealed(blocks[0]) and store.pool.open_rows == 0
        store.check()
        assert store.bytes() < paged("qwen3", pages=12).store.bytes()
