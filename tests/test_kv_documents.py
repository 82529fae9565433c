"""Documents are computed once, stand anywhere, and answers are those of dense attention under their mask."""

from collections.abc import Sequence
from functools import cache
from itertools import permutations

import pytest
import torch
from conftest import tiny_model
from paging import dense_answer, text
from transformers import AutoModelForCausalLM

import strop
from strop.core.chunks import Fixed
from strop.core.errors import StropError
from strop.kv import DocumentStore, KVarN, SegmentCache
from strop.kv.requests import Answer
from strop.kv.reuse import Documents, Segments
from strop.recipe import Recipe
from strop.tasks.documents import Size, look_ups

NAME, PAGE = "qwen3", 8
TEXTS = [text(length, seed) for seed, length in enumerate((13, 21, 5))]
QUERY = text(19, 9)
LONG = [text(length, seed) for seed, length in enumerate((45, 60, 8, 29))]
CODEC = KVarN(bits=4, group=PAGE).codec()


def store(pages: int = 64, **options) -> DocumentStore:
    return DocumentStore(tiny_model(NAME), pages=pages, page=PAGE, **options)


def dense(documents: Sequence[Sequence[int]], query: Sequence[int], count: int) -> list[int]:
    """What dense attention under the documents' mask writes."""
    written: list[int] = []
    for _ in range(count):
        written.append(int(dense_answer(NAME, documents, [*query, *written])[-1].argmax()))
    return written


def plain(tokens: Sequence[int], count: int) -> list[int]:
    """What transformers writes."""
    model = tiny_model(NAME, "sdpa")
    return model.generate(torch.tensor([tokens]), max_new_tokens=count, do_sample=False)[
        0, len(tokens) :
    ].tolist()


def sealed_bytes(documents: DocumentStore, texts: Sequence[Sequence[int]]) -> list[bytes]:
    """The bytes of documents' pages."""
    pool = documents.store.pool
    pages = [documents.store._page[block] for tokens in texts for block in documents.store.blocks(tokens)]
    return [tensor[pages].numpy().tobytes() for tensor in pool.keys + pool.values]


@cache
def rag(dtype: str = "fp32") -> strop.Model:
    return strop.load("zoo:rag", dtype=dtype)


class TestOrder:
    def test_after_one_request_any_permutation_or_subset_computes_no_document(self):
        documents = store()
        first = documents.generate(QUERY, TEXTS, 6)
        assert first.computed_document_tokens == 39 and first.token_ids == dense(TEXTS, QUERY, 6)
        before = sealed_bytes(documents, TEXTS)
        for count in (1, 2, 3):
            for order in permutations(TEXTS, count):
                found = documents.generate(QUERY, order, 6)
                again = order == tuple(TEXTS)
                assert found.computed_document_tokens == 0
                assert found.computed_tokens == (3 if again else 19), "a query's own pages are cached too"
                assert found.token_ids == dense(order, QUERY, 6)
        assert sealed_bytes(documents, TEXTS) == before
        documents.store.check()

    def test_a_document_may_stand_twice(self):
        documents = store()
        order = [TEXTS[0], TEXTS[1], TEXTS[0]]
        found = documents.generate(QUERY, order, 6)
        assert found.computed_document_tokens == 34 and found.token_ids == dense(order, QUERY, 6)
        documents.store.check()

    def test_two_requests_of_one_batch_read_a_page_at_different_places(self):
        documents = store()
        handles = documents.add(TEXTS)
        orders = [(0, 1, 2), (2, 1, 0)]
        requests = [documents.request(QUERY, [handles[i] for i in order], 6) for order in orders]
        for request in requests:
            documents.engine.submit(request)
        documents.engine.step()
        shared = [request.held.documents[handles[1].blocks] for request in requests]
        assert shared[0] == shared[1]
        places = [request.held.segments(request, PAGE)[1].shift for request in requests]
        assert places == [13, 5]
        documents.engine.run()
        for request, order in zip(requests, orders, strict=True):
            assert request.output == dense([TEXTS[i] for i in order], QUERY, 6)
        documents.store.check()

    def test_what_gave_way_is_computed_again(self):
        documents = store(pages=9)
        handles = documents.add([*TEXTS, text(30, 5)])
        found = documents.generate(QUERY[:7], handles[:3], 4)
        assert 0 < found.recomputed_tokens == found.computed_document_tokens
        assert found.token_ids == dense(TEXTS, QUERY[:7], 4)
        documents.store.check()


class TestPacked:
    def test_answers_are_those_of_a_store_that_holds_what_the_codec_gives_back(self):
        packed, plain = store(codec=CODEC, open_pages=24), store()
        for one in (packed, plain):
            one.add(LONG)
        source, target = packed.store.pool, plain.store.pool
        assert source.coded.sum() == 4 + 6 + 0 + 2
        for block, page in packed.store._page.items():
            to = plain.store._page[block]
            for layer, (keys, values) in enumerate(zip(target.keys, target.values, strict=True)):
                if source.coded[page]:
                    keys[to], values[to] = CODEC.decode(source.records[layer][page], keys.shape[-1])
                else:
                    row = source.row[page]
                    keys[to], values[to] = source.keys[layer][row], source.values[layer][row]
            plain.store._seals[to] = plain.store._seals[to]._replace(
                checksum=target.sums([to], [plain.store._seals[to].valid])[0]
            )
        for order in ([0, 1, 2, 3], [3, 1], [2, 3, 0]):
            found, wanted = (one.generate(QUERY[:6], [LONG[i] for i in order], 8) for one in (packed, plain))
            assert found.token_ids == wanted.token_ids
            assert found.computed_document_tokens == wanted.computed_document_tokens == 0
        packed.store.check()

    def test_all_bytes_are_counted(self):
        packed, plain = store(codec=CODEC, open_pages=16), store()
        record, heads, dim, layers = CODEC.record_bytes(16), 2, 16, 2
        assert plain.store.bytes() == 64 * 2 * layers * heads * PAGE * dim * 4
        assert packed.store.bytes() == plain.store.bytes() // 4 + 64 * layers * heads * record
        assert store(codec=CODEC).store.bytes() == packed.store.bytes(), "a quarter is open by default"

    def test_sessions_pack_their_pages_too(self):
        cache = SegmentCache(tiny_model(NAME), pages=40, page=PAGE, codec=CODEC, open_pages=8)
        first, again = (cache.generate(text(80, 1), 6) for _ in range(2))
        assert cache.store.pool.coded.sum() >= 8 and again.reused_tokens == 72
        assert len(first.token_ids) == len(again.token_ids) == 6
        cache.store.check()

    def test_sessions_are_exact_in_16_bits_alone(self):
        assert Segments().lossless and not Segments(bits=8).lossless
        with pytest.raises(StropError, match="bits must be one of 1, 2, 4, 8 or 16, got 3"):
            Recipe.from_dict({"strop": 1, "reuse": {"segments": {"bits": 3}}})

    def test_a_recipe_packs_them_and_the_bundled_model_still_finds_what_they_say(self):
        lm = rag().with_(reuse=Documents(pages=120, bits=4))
        documents = lm.recipe.reuse.open(lm)
        right = 0
        for asked in look_ups(8, 3, Size(documents=(4, 4), facts=(8, 10), queries=1)):
            found = documents.generate(asked.queries[0], documents.add(asked.documents), 8)
            right += found.text == asked.answers[0]
        assert documents.store.pool.coded.any() and right >= 7
        assert documents.store.bytes() < 0.75 * Documents(pages=120).open(lm).store.bytes()
        documents.store.check()


class TestPreemption:
    def test_documents_are_attached_once_however_often_a_request_comes(self):
        documents = store(pages=13, chunks=Fixed(16))
        handles, engine = documents.add(TEXTS), documents.engine
        requests = [documents.request(text(5, seed), handles, 25) for seed in range(3)]
        for request in requests:
            engine.submit(request)
        while engine.running or engine.waiting:
            engine.step()
            for request in engine.running:
                context = request.held.segments(request, PAGE)
                assert sum(segment.tokens for segment in context) == 39 + len(request.tokens)
            held = sum(len(request.held.named()) for request in engine.running)
            assert sum(documents.store._holders.values()) == held
        assert sum(request.preemptions for request in requests) > 0
        assert sum(request.computed_document_tokens for request in requests) == 0
        for seed, request in enumerate(requests):
            assert request.output == dense(TEXTS, text(5, seed), 25)
        documents.store.check()


class TestRepair:
    def test_documents_repaired_to_their_end_are_read_in_sequence(self):
        documents = store(repair=24)
        for order in permutations(TEXTS):
            tokens = [token for document in order for token in document]
            found = documents.generate(QUERY, order, 6)
            assert found.token_ids == plain([*tokens, *QUERY], 6)
        assert documents.generate(QUERY, order, 6).computed_document_tokens == 39 - len(order[0])
        documents.store.check()

    def test_the_first_tokens_alone_see_the_documents_before(self):
        documents = store(repair=8, chunks=Fixed(8))
        for order in permutations(TEXTS):
            written = []
            for _ in range(6):
                written.append(self.repaired(order, [*QUERY, *written], 8))
            assert documents.generate(QUERY, order, 6).token_ids == written
        documents.store.check()

    def repaired(self, texts: Sequence[list[int]], query: list[int], count: int) -> int:
        """The next token by dense attention: documents alone, copies of first tokens, and the query."""
        ids, positions, owner, hidden, start = [], [], [], [], 0
        for number, document in enumerate(texts):
            copied = min(count, len(document)) if number else 0
            ids += document + document[:copied]
            positions += [*range(start, start + len(document)), *range(start, start + copied)]
            owner += [number] * len(document) + [-1] * copied
            hidden += [slot < copied for slot in range(len(document))] + [False] * copied
            start += len(document)
        ids += query
        positions += range(start, start + len(query))
        owner += [-1] * len(query)
        hidden += [False] * len(query)
        at, of, unseen = torch.tensor(positions), torch.tensor(owner), torch.tensor(hidden)
        sees = (at[None] <= at[:, None]) & ((of[None] == of[:, None]) | ((of[:, None] == -1) & ~unseen))
        with torch.no_grad():
            found = tiny_model(NAME, "sdpa")(
                torch.tensor([ids]), attention_mask=sees[None, None], position_ids=at[None], use_cache=False
            )
        return int(found.logits[0, -1].argmax())


class TestText:
    def test_the_bundled_model_finds_what_documents_say_in_any_order(self):
        documents = DocumentStore(rag(), pages=100)
        [asked] = look_ups(1, 3, Size(documents=(4, 4), facts=(3, 3), queries=3))
        handles = documents.add(asked.documents)
        for query, answer in zip(asked.queries, asked.answers, strict=True):
            for order in (handles, handles[::-1], handles[2:] + handles[:2]):
                found = documents.generate(query, order, max_new_tokens=8)
                assert found.text == answer and found.computed_document_tokens == 0
                assert found.token_ids[-1] in documents.texts.ends
        drawn = [documents.generate(query, handles, 8, seed=1, temperature=2.0).token_ids for _ in range(2)]
        assert drawn[0] == drawn[1]
        documents.store.check()

    def test_a_transformers_model_and_its_tokenizer_serve_as_well(self):
        lm = rag()
        documents = DocumentStore(lm.model, lm.tokenizer, pages=20)
        assert documents.generate("?abc=", ["[abc=123;]\n", "[xyz=456;]\n"], 3).text == "123"


class TestRefusals:
    @pytest.mark.parametrize(
        ("use", "words"),
        [
            (lambda d: d.generate([], TEXTS), "a text is empty"),
            (lambda d: d.add([[]]), "a text is empty"),
            (lambda d: d.add("a document"), "documents come in a list"),
            (lambda d: d.add(5), "documents come in a list"),
            (lambda d: SegmentCache(tiny_model(NAME), pages=9).generate(3), "a text is a str or a sequence"),
            (lambda d: d.generate(QUERY, d.add(TEXTS[:1])[0]), "documents come in a list"),
            (lambda d: d.add([3]), "a text is a str or a sequence of token ids, not 3"),
            (lambda d: d.generate([1.5]), r"sequence of token ids, not \[1.5\]"),
            (lambda d: d.generate([61]), "61 embeddings do not cover"),
            (lambda d: d.generate("what?"), "a text needs a tokenizer"),
            (lambda d: d.add([[1] * 5000]), "exceed the 4096 that this model was made for"),
            (lambda d: d.generate([1], [[1] * 2000] * 2, 97), "exceed the 4096"),
            (lambda d: d.add([[1] * 600]), "needs 75 pages of 8 tokens and the store has 64"),
            (lambda d: d.generate([1], [], 0), "nor one by none"),
            (lambda d: d.generate([1], [], 3, seed=0, temperature=0.0), "temperature must be above 0"),
            (lambda d: store(repair=12), "a repair of 12 tokens cuts a page"),
            (lambda d: d.generate(QUERY, DocumentStore(tiny_model(NAME), pages=9).add(TEXTS)), "of another"),
            (lambda d: d.generate(QUERY, other().add(TEXTS)), "the store of another model or page size"),
        ],
    )
    def test_bad_input_is_one_sentence(self, use, words):
        documents = store()
        with pytest.raises(StropError, match=words):
            use(documents)
        assert not documents.engine.waiting and documents.store.residency.used == 0

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: DocumentStore(tiny_model("gpt2"), pages=9), "use a model with RoPE"),
            (lambda: DocumentStore(tiny_model("gemma2"), pages=9), "full attention throughout"),
            (lambda: DocumentStore(tiny_model(NAME), pages=9, page=12), "a page of 12 tokens does not fit"),
            (lambda: DocumentStore(3, pages=9), "int is no model"),
            (lambda: DocumentStore(rag().with_(kv=KVarN()), pages=9), "pages replace the recipe's cache"),
            (
                lambda: SegmentCache(tiny_model(NAME), pages=9, evictor="belady"),
                "there is no evictor .*: choose one",
            ),
        ],
    )
    def test_what_cannot_keep_documents_is_refused(self, make, words):
        with pytest.raises(StropError, match=words):
            make()


def other() -> DocumentStore:
    """A store of a model with other weights."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_model(NAME).config).eval()
    return DocumentStore(model, pages=64, page=PAGE)


class TestSessions:
    @pytest.mark.parametrize("evictor", ["lru", "asymcache", "pensieve", "max-score", "ghost"])
    def test_sessions_that_lose_blocks_go_on_as_if_they_had_not(self, evictor):
        cache = SegmentCache(tiny_model(NAME), pages=24, page=PAGE, evictor=evictor)
        sessions, answers = [text(20, seed) for seed in range(3)], list[Answer]()
        for turn in range(5):
            for number, tokens in enumerate(sessions):
                answers.append(cache.generate(tokens, 6))
                assert answers[-1].token_ids == plain(tokens, 6)
                sessions[number] = tokens + answers[-1].token_ids + text(9, turn)
        assert sum(answer.recomputed_tokens for answer in answers) > 0
        assert sum(answer.reused_tokens for answer in answers) > 0
        cache.store.check()

    def test_a_conversation_begins_as_the_tokenizer_says_and_a_document_does_not(self):
        class Beginning:
            def __call__(self, text, add_special_tokens):
                return {"input_ids": [1] * add_special_tokens + [ord(letter) - 90 for letter in text]}

            def decode(self, ids, skip_special_tokens):
                return ""

        model, letters = tiny_model(NAME), [7, 8, 9]
        cache, documents = (
            kind(model, Beginning(), pages=9, page=PAGE) for kind in (SegmentCache, DocumentStore)
        )
        assert cache.generate("abc", 6).token_ids == plain([1, *letters], 6)
        assert documents.generate("abc", max_new_tokens=6).token_ids == plain(letters, 6)
        assert cache.request("abc").tokens != documents.request("abc").tokens

    def test_a_conversation_in_text_and_in_messages(self):
        lm = rag()
        cache = SegmentCache(lm, pages=64)
        prompt = "[abc=123;]\n?abc="
        assert cache.generate(prompt, 3).text == lm.generate([prompt], 3)[0]
        assert cache.generate(prompt, 3, seed=2).text == lm.generate([prompt], 3, seed=2)[0]
        with pytest.raises(StropError, match="no chat template"):
            cache.generate([{"role": "user", "content": prompt}])
        lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        try:
            assert (
                cache.generate([{"role": "user", "content": prompt}], 3).text
                == cache.generate(prompt, 3).text
            )
        finally:
            lm.tokenizer.chat_template = None


def test_without_a_number_of_pages_there_are_enough_for_four_contexts():
    lm = rag()
    for made in (DocumentStore(lm), SegmentCache(lm)):
        tokens = made.store.pages * made.store.page
        assert tokens == min(4 * made.store.context, 32_768) // made.store.page * made.store.page
