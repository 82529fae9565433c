"""lm-evaluation-harness over strop: the numbers of its own model of transformers, and what a cache costs."""

from pathlib import Path

import pytest
import torch
from harness_tasks import PAGES, TASKS, write_tasks
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from test_cli import save_tiny

import strop
from strop.core.cache import commit
from strop.decode import DDTree
from strop.harness import StropLM, Suite
from strop.kv import KVarN, StreamingLLM
from strop.weights import RTN

TWO_BITS = KVarN(bits_k=2, bits_v=2, group=16, sinks=4, tail=16)


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Suite:
    return Suite([str(write_tasks(tmp_path_factory.mktemp("tasks")))])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model of noise with sharp attention, that reads bytes."""
    folder = tmp_path_factory.mktemp("noise") / "model"
    return save_tiny(folder, initializer_range=0.3, max_position_embeddings=512)


@pytest.fixture(scope="module")
def plain(place) -> strop.Model:
    return strop.load(place, "fp32")


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def split(page: str) -> tuple[str, str]:
    """A context that ends in no space, which the harness would move, and what follows."""
    context = page[:-60].rstrip()
    return context, page[len(context) :]


def pairs() -> list[Instance]:
    return asked("loglikelihood", *(split(page) for page in PAGES))


# The same as transformers


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_without_a_kv_method_all_numbers_are_those_of_hf(dtype, place, suite):
    spelled = {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    theirs = HFLM(str(place), device="cpu", dtype=spelled, batch_size=3)
    ours = StropLM(str(place), dtype, batch_size=3)
    assert list(suite.tasks) == list(TASKS)
    for name, task in suite.tasks.items():
        one, other = (evaluate(lm=lm, task_dict=task, bootstrap_iters=10) for lm in (theirs, ours))
        for sample, twin in zip(one["samples"][name], other["samples"][name], strict=True):
            assert sample["resps"] == twin["resps"] and sample["resps"]
        assert one["results"] == other["results"] and one["results"][name]


def test_sampling_draws_what_hf_draws(place, plain):
    request = asked("generate_until", (PAGES[0], {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12}))
    texts = []
    for lm in (HFLM(str(place), device="cpu", dtype="float32"), StropLM(plain)):
        for seed in (1, 2):
            torch.manual_seed(seed)
            texts += lm.generate_until(request, disable_tqdm=True)
    assert texts[:2] == texts[2:] and texts[0] != texts[1]


# What a recipe changes


@torch.no_grad()
def by_hand(lm: strop.Model, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of all tokens but the first, read 64 at a time through the recipe's cache."""
    cache, out = lm.new_cache(), []
    for start in range(0, len(ids), 64):
        block = torch.tensor([ids[start : start + 64]])
        out.append(lm.model(block, past_key_values=cache, use_cache=True).logits[0])
        commit(cache)
    told = torch.cat(out)[:-1].log_softmax(-1)
    return told.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("method", [TWO_BITS, StreamingLLM(budget=64, buffer=16)], ids=["kvarn", "streaming"])
def test_a_kv_method_is_felt_as_in_decoding_whatever_the_batch(method, plain):
    thin = plain.with_(kv=method)
    as_is, alone, together = (
        [told for told, _ in StropLM(lm, batch_size=size).loglikelihood(pairs(), disable_tqdm=True)]
        for lm, size in ((plain, 1), (thin, 1), (thin, 5))
    )
    for page, found, batched, before in zip(PAGES, alone, together, as_is, strict=True):
        context, whole = (plain.encode(text) for text in (split(page)[0], page))
        ours = by_hand(thin, whole)[len(context) - 1 :].sum().item()
        assert found == pytest.approx(ours, abs=1e-3)
        assert batched == pytest.approx(found, abs=0.02)
        assert abs(found - before) > 0.05


def test_rolling_windows_go_through_the_cache(plain):
    thin = plain.with_(kv=TWO_BITS)
    lm = StropLM(thin, batch_size=2)
    found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (PAGES[2],)), disable_tqdm=True)[0]
    ids = [lm.prefix_token_id, *plain.encode(PAGES[2])]
    assert found == pytest.approx(by_hand(thin, ids).sum().item(), abs=1e-2)
    assert abs(found - by_hand(plain, ids).sum().item()) > 1


def test_generation_runs_over_the_cache_and_stops_as_hf_does(plain):
    thin = plain.with_(kv=TWO_BITS)
    request = asked("generate_until", *((page, {"until": ["e"], "max_gen_toks": 24}) for page in PAGES))
    texts = StropLM(thin, batch_size=5).generate_until(request, disable_tqdm=True)
    for page, text in zip(PAGES, texts, strict=True):
        whole = plain.tokenizer.decode(thin.generate_ids([plain.encode(page)], 24)[0])
        assert text == whole.partition("e")[0]
    assert texts != StropLM(plain, batch_size=5).generate_until(request, disable_tqdm=True)


def test_drafts_change_no_text_and_are_one_at_a_time(plain):
    drafted = plain.with_(decode=DDTree(drafter="ngram", budget=8))
    request = asked("generate_until", *((page, {"until": ["\n\n"], "max_gen_toks": 24}) for page in PAGES))
    lm = StropLM(drafted, batch_size=3)
    texts = lm.generate_until(request, disable_tqdm=True)
    assert texts == StropLM(plain, batch_size=3).generate_until(request, disable_tqdm=True)
    assert drafted.decoding["custom_generate"].stats.rounds > 0


@torch.no_grad()
def test_quantized_weights_are_what_is_scored(plain):
    small = plain.with_(weights=RTN(bits=4))
    found = StropLM(small).loglikelihood(pairs()[:1], disable_tqdm=True)[0][0]
    ours, before = (
        by_hand(lm, plain.encode(PAGES[0]))[len(plain.encode(split(PAGES[0])[0])) - 1 :].sum().item()
        for lm in (small, plain)
    )
    assert found == pytest.approx(ours, abs=1e-3) and abs(found - before) > 0.05


def test_chat_templates_are_the_tokenizers(plain, suite):
    lm = StropLM(plain)
    lm.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    told = evaluate(lm=lm, task_dict=suite.tasks["writing"], limit=1, apply_chat_template=True)
    prompt = told["samples"]["writing"][0]["arguments"][0][0]
    assert prompt.startswith("<user>") and prompt.endswith("<answer>")
    assert plain.tokenizer.chat_template is None
