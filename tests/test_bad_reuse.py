"""Bad input to shared pages, by the classes that users hold: refused in one sentence, or never served."""

from collections.abc import Callable

import pytest
import torch
from conftest import tiny_model
from paging import text
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, OPTConfig

from strop.core.errors import StropError
from strop.kv import DocumentStore, KVarN, SegmentCache
from strop.kv.engine import Engine
from strop.kv.paged import PagedModel, Segment, Share
from strop.kv.pages import PagedStore

NAME, PAGE = "qwen3", 8
TEXTS = [text(length, seed) for seed, length in enumerate((13, 21, 5))]
QUERY = text(19, 9)
SIZES = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
UNMOVABLE = {
    "ALiBi, BLOOM": BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2),
    "ALiBi, Falcon": FalconConfig(**SIZES, alibi=True, eos_token_id=2),
    "learned positions, OPT": OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=16),
}


def sentence(use: Callable[[], object]) -> str:
    with pytest.raises(StropError) as refused:
        use()
    said = str(refused.value)
    assert "\n" not in said and len(said) < 300
    return said


@pytest.mark.parametrize("name", UNMOVABLE)
@pytest.mark.parametrize("kind", [DocumentStore, SegmentCache])
def test_keys_that_do_not_turn_are_refused(name, kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(UNMOVABLE[name]).eval()
    said = sentence(lambda: kind(model, pages=9, page=PAGE))
    assert "rotary" in said or "RoPE" in said, said


def test_a_document_longer_than_the_context_leaves_the_others_there():
    documents = DocumentStore(tiny_model(NAME), pages=600, page=PAGE)
    [kept] = documents.add(TEXTS[:1])
    assert "exceed the 4096" in sentence(lambda: documents.add([TEXTS[1], [1] * 4097]))
    whole = documents.add([[1] * 4096])
    assert "exceed the 4096" in sentence(lambda: documents.generate(QUERY, whole, 1))
    assert documents.generate(QUERY, [kept], 2).computed_document_tokens == 0
    documents.store.check()


def test_a_last_token_at_the_end_of_the_context_is_written_and_none_beyond():
    documents = DocumentStore(tiny_model(NAME), pages=600, page=PAGE)
    long = documents.add([[1] * (4096 - 13 - 3 - 2), TEXTS[0]])
    assert len(documents.generate([5, 6, 7], long, 2).token_ids) == 2
    assert "exceed the 4096" in sentence(lambda: documents.generate([5, 6, 7], long, 3))


@pytest.mark.parametrize(("start", "shift"), [(2**31, 0), (0, 2**31), (0, -(2**31)), (2**62, 2**62)])
def test_an_offset_beyond_any_context_is_no_position(start, shift):
    store = PagedStore(tiny_model(NAME), 8, PAGE)
    lm = PagedModel(tiny_model(NAME), store)
    page = store.acquire([], 1, 0.0).anonymous
    said = sentence(lambda: lm([Share([5], [start], [Segment(page, start, 8, shift)])]))
    assert "beyond the 4096" in said


def test_a_page_of_another_size_than_the_codecs_or_the_stores():
    codec = KVarN(bits=4, group=16).codec()
    said = sentence(lambda: PagedStore(tiny_model(NAME), 8, PAGE, codec=codec, open_pages=2))
    assert "packs 16 tokens" in said and "holds 8" in said
    large, small = (DocumentStore(tiny_model(NAME), pages=32, page=page) for page in (16, PAGE))
    assert "page size" in sentence(lambda: small.generate(QUERY, large.add(TEXTS), 1))


def test_a_store_that_two_models_share():
    store = PagedStore(tiny_model(NAME), 32, PAGE)
    Engine(tiny_model(NAME), store)
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(tiny_model(NAME).config).eval()
    assert "of another model" in sentence(lambda: Engine(other, store))
    assert "of another model" in sentence(lambda: PagedModel(tiny_model(NAME, dtype=torch.bfloat16), store))


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_corrupted_page_of_a_document_is_computed_again_and_never_served(side, layer):
    documents = DocumentStore(tiny_model(NAME), pages=32, page=PAGE)
    first = documents.generate(QUERY, TEXTS, 6)
    block = documents.store.blocks(TEXTS[1])[1]
    pages = getattr(documents.store.pool, side)[layer]
    pages[documents.store._page[block], 0, 3, 1] += 0.5
    again = documents.generate(QUERY, TEXTS, 6)
    assert again.token_ids == first.token_ids
    assert again.computed_document_tokens == again.recomputed_tokens == PAGE
    documents.store.check()


def test_a_corrupted_page_of_a_session_is_computed_again_and_never_served():
    cache = SegmentCache(tiny_model(NAME), pages=32, page=PAGE)
    first = cache.generate(text(40, 3), 6)
    page = cache.store._page[cache.store.blocks(text(40, 3))[2]]
    cache.store.pool.keys[1][page].view(torch.uint8)[0, 0, 0] ^= 1
    again = cache.generate(text(40, 3), 6)
    assert again.token_ids == first.token_ids and again.recomputed_tokens >= PAGE
    cache.store.check()
