"""A replay takes the rounds of decoding, and recorded probabilities are the target's own."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from strop.decode import Chain, FixedBudget, Grown, KeyedGumbel, Throughput, load_drafter, speculative
from strop.decode.cost import CostModel
from strop.decode.simulate import Trace, expected, path_probabilities, record, replay
from strop.decode.tree import DraftTree
from strop.models.zoo import zoo_path
from strop.tasks import python_source

NEW = 24
COST = CostModel({0: {1: 6e-3, 64: 18e-3}}, draft_s=3e-3)


@pytest.fixture(scope="module")
def coder():
    """The bundled coder in float32 with stock attention, its drafter, and a prompt."""
    model = AutoModelForCausalLM.from_pretrained(zoo_path("coder"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(zoo_path("coder"))
    prompt = tokenizer(python_source.held_out_text(800)[0]).input_ids
    return model, load_drafter("zoo:coder-dflash", model), prompt


@pytest.fixture(scope="module", params=[None, 3], ids=["greedy", "sampled"])
def trace(coder, request) -> tuple[Trace, int | None]:
    model, drafter, prompt = coder
    return record(model, drafter, Grown(FixedBudget(16)), prompt, NEW, seed=request.param), request.param


def decode(coder, tree, seed):
    """The text and the statistics of real decoding."""
    model, drafter, prompt = coder
    sampler = None if seed is None else KeyedGumbel(seed)
    write = speculative(drafter, tree, sampler)
    ids = torch.tensor([prompt])
    options = {"do_sample": seed is not None, "top_k": None if seed is None else 0}
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, custom_generate=write, **options
    )
    return out[0].tolist(), write.stats


@pytest.mark.parametrize(
    "tree", [Chain(), Grown(FixedBudget(0)), Grown(FixedBudget(5)), Grown(FixedBudget(16))], ids=repr
)
def test_a_replay_takes_the_rounds_of_decoding(coder, trace, tree):
    recorded, seed = trace
    text, stats = decode(coder, tree, seed)
    found = replay(recorded, tree, COST)
    assert recorded.tokens == text and recorded.start == len(coder[2])
    assert sum(found.emitted) == stats.emitted == len(text) - recorded.start - 1
    assert Counter(n - 1 for n in found.emitted) == stats.accepted and Counter(found.nodes) == stats.nodes
    assert sum(found.seconds) == pytest.approx(sum(9e-3 + n * 12e-3 / 63 for n in found.nodes))


def test_a_builder_hears_of_replayed_rounds(trace):
    rule = Throughput(COST, price="global", most=16)
    found = replay(trace[0], Grown(rule), COST)
    assert 0 < rule.elapsed <= sum(found.seconds) and rule.cost.factor == pytest.approx(1)


def test_recorded_probabilities_are_the_targets(coder, trace):
    recorded, seed = trace
    moment = recorded.moments[3]
    tree = Grown(FixedBudget(16)).build(moment.proposal, moment.root, moment.context, 16, None)
    assert recorded.tokens[moment.context] == moment.root and len(moment.reach) == 16
    given = recorded.tokens[: moment.context]
    for node in range(1, len(tree)):
        path = [tree.token[i] for i in tree.path(node)]
        with torch.no_grad():
            logits = coder[0](torch.tensor([given + path])).logits[0, len(given) : -1]
        rows = logits.softmax(-1) if seed is not None else (logits == logits.amax(-1, keepdim=True)).float()
        p = rows[torch.arange(len(path) - 1), torch.tensor(path[1:])].prod()
        assert moment.reach[node - 1] == pytest.approx(float(p), abs=1e-5)


def test_smaller_trees_are_beginnings_of_the_recorded(trace):
    moments = trace[0].moments
    found = [expected(moments, [n] * len(moments)) for n in (0, 4, 16)]
    for moment, none, some, most in zip(moments, *found, strict=True):
        assert none == 1 and some == pytest.approx(1 + moment.reach[:4].sum())
        assert none <= some <= most <= 8
        assert moment.deltas(16) == sorted(moment.deltas(16), reverse=True)


def test_greedy_rounds_emit_what_was_to_be_expected(trace):
    """Up to the round that the end of the text cuts short."""
    recorded, seed = trace
    found = replay(recorded, Grown(FixedBudget(16)), COST)
    moments = [recorded.moments[at] for at in found.at[:-1]]
    if seed is None:
        assert expected(moments, found.nodes[:-1]) == found.emitted[:-1]
    assert found.at == [0, *np.cumsum(found.emitted)[:-1]]


def test_nothing_behind_what_the_target_rejects_is_asked_for():
    class Judge:
        generator = None

        def token(self, path):
            assert path == [0]
            return 7

    tree = DraftTree([1, 5, 6], [-1, 0, 1], [0, 1, 2], [0.0, -1.0, -2.0])
    assert path_probabilities(tree, Judge()).tolist() == [0, 0]
