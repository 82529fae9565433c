"""N-grams and small models as drafters."""

import json
from copy import deepcopy
from random import Random

import pytest
import torch
from conftest import CONFIGS
from drafting import target
from transformers import AutoModelForCausalLM, MistralConfig

from strop.core.errors import StropError
from strop.decode import FixedBudget, load_drafter, speculative
from strop.decode.builder import chain
from strop.decode.ngram import NGram
from strop.decode.proposal import Proposal
from strop.decode.small_lm import SmallLM


def said(proposal: Proposal) -> dict[tuple[int, ...], float]:
    """Probability of every path, given the one before."""
    proposal.check()
    found: dict[tuple[int, ...], float] = {}

    def follow(path: tuple[int, ...], row: int) -> None:
        depth = len(path)
        if row < 0 or depth == proposal.horizon:
            return
        tables = (proposal.tokens, proposal.logp, proposal.next_row)
        for token, logp, link in zip(*(table[depth, row].tolist() for table in tables), strict=True):
            if logp > -1e30:
                found[(*path, token)] = pytest.approx(torch.tensor(logp).exp().item())
                follow((*path, token), link)

    follow((), 0)
    return found


A, B, C, D, E = range(1, 6)
TEXTS = {
    "nothing repeats": ([A, B, C], 3, {}),
    "a single token": ([A], 3, {}),
    "no text": ([], 3, {}),
    "once": ([A, B, C, D, A, B], 3, {(C,): 1 / 2, (C, D): 1 / 2, (C, D, A): 1 / 2}),
    "the newest is not its own follower": ([A, A], 2, {(A,): 1 / 2}),
    "two followers": (
        [A, B, D, A, C, E, A],
        2,
        {(B,): 1 / 3, (B, D): 1 / 2, (C,): 1 / 3, (C, E): 1 / 2},
    ),
    "longest first": ([A, B, C, B, D, A, B], 1, {(C,): 1 / 2}),
    "shorter where longer is new": ([A, B, C, D, B], 2, {(C,): 1 / 2, (C, D): 1 / 2}),
    "a trie": (
        [A, B, C, E, A, B, D, E, A, B, C, D, A, B],
        2,
        {(C,): 2 / 4, (C, D): 1 / 3, (C, E): 1 / 3, (D,): 1 / 4, (D, E): 1 / 2},
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_what_followed_an_ngram(case):
    text, horizon, expected = TEXTS[case]
    assert said(NGram(horizon).propose(text, 16)) == expected


def test_the_most_frequent_follower_comes_first_and_width_cuts():
    text = [A, B, A, C, A, C, A, D, A]
    proposal = NGram(1).propose(text, 16)
    assert proposal.tokens[0, 0, 0] == C and said(proposal) == {(B,): 1 / 5, (C,): 2 / 5, (D,): 1 / 5}
    assert said(NGram(1).propose(text, 1)) == {(C,): 2 / 5}
    many = [A, B] * 3 + [A, C] * 9 + [A]  # the eight newest count
    assert said(NGram(1, longest=1).propose(many, 16)) == {(C,): 8 / 9}


@pytest.mark.parametrize("vocabulary", [2, 5, 30])
def test_ngrams_read_round_by_round(vocabulary):
    chance = Random(vocabulary)
    text, step, at = [chance.randrange(vocabulary) for _ in range(150)], NGram(6), 0
    for _ in range(2):
        while at < len(text):
            at = min(at + chance.randrange(1, 6), len(text))
            assert said(step.propose(text[:at], 5)) == said(NGram(6).propose(text[:at], 5))
        step.reset()
        text, at = text[::-1], 0


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@torch.no_grad()
def test_a_small_model_drafts_what_it_would_write(name):
    """Whatever came true of what it drafted before."""
    model, chance = target(name, 1), Random(1)
    draft = SmallLM(model, target(name, 0), horizon=4)
    text = [chance.randrange(61) for _ in range(6)]
    for round in range(25):
        proposal = draft.propose(text, 3 if round % 5 else 1000)
        proposal.check()
        ids = torch.tensor([text])
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
        )[0, len(text) :].tolist()
        assert chain(proposal, text[-1], 9).token == [text[-1], *written]
        logp = model(torch.tensor([[*text, *written[:-1]]])).logits[0, -4:].log_softmax(-1)
        wide = 3 if round % 5 else 61
        assert proposal.tokens.shape == (4, 1, wide)
        assert (proposal.logp[:, 0] - logp.topk(wide).values).abs().max() < 1e-4
        assert draft.cache.get_seq_length() == len(draft.held) == len(text) + 3
        came_true = chance.randrange(5)
        text += [*written[:came_true], chance.randrange(61)]
        if round == 12:
            text = text[:4]  # another sequence
            draft.reset()


def test_small_models_that_cannot_draft_are_refused():
    with pytest.raises(StropError, match=r"knows 7 tokens and the target 61.*target's tokenizer"):
        SmallLM(target("qwen3", 0, 7), target())
    config = MistralConfig(**{**CONFIGS["mistral"].to_dict(), "sliding_window": 8})
    with pytest.raises(StropError, match=r"sliding window.*draft trees"):
        SmallLM(AutoModelForCausalLM.from_config(config), target())


def test_a_small_model_in_a_folder(tmp_path):
    model = deepcopy(target("llama", 1))
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    draft = load_drafter(tmp_path, target("qwen3"))
    assert isinstance(draft, SmallLM) and draft.model.dtype == torch.float32
    assert all(map(torch.equal, draft.model.parameters(), model.parameters()))
    target("qwen3", 0, 7).save_pretrained(tmp_path)
    with pytest.raises(StropError, match="knows 7 tokens"):
        load_drafter(str(tmp_path), target("qwen3"))


def test_a_small_model_falls_silent_behind_its_context():
    model = target("llama", 1)
    draft = SmallLM(deepcopy(model), model, horizon=5)
    draft.limit = 20
    assert draft.propose(list(range(1, 16)), 4).horizon == 5
    assert draft.propose(list(range(1, 17)), 4).horizon == 0
    ids, options = torch.arange(1, 9)[None], {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    spec = speculative(draft, FixedBudget(8))
    assert torch.equal(model.generate(ids, custom_generate=spec, **options), model.generate(ids, **options))


def test_a_small_model_with_another_tokenizer_is_refused(tmp_path):
    model = deepcopy(target("llama", 1))
    for name, first in (("small", 0), ("large", 1)):
        model.save_pretrained(tmp_path / name)
        vocabulary = {chr(65 + token): (token + first) % 61 for token in range(61)}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    large = AutoModelForCausalLM.from_pretrained(tmp_path / "large")
    with pytest.raises(StropError, match="has another tokenizer than"):
        load_drafter(tmp_path / "small", large)
    assert isinstance(load_drafter(tmp_path / "large", large), SmallLM)
