"""Trees that are drawn, and the statistics of a generation, through the engine."""

import pytest
import torch
from drafting import DRAFTERS, Liar, cost, drafter, net, target
from scipy.stats import chisquare
from test_decode_engine import IDS, write
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from strop.core.errors import StropError
from strop.core.sampling import KeyedSampler
from strop.decode import (
    Chain,
    Drawn,
    FixedBudget,
    KeyedGumbel,
    Multinomial,
    RecursiveRejection,
    Throughput,
    Traversal,
    speculative,
)
from strop.decode.dflash import DFlashDrafter
from strop.decode.ngram import NGram
from strop.decode.stats import Stats
from strop.kv import KVarN

V, RUNS = 7, 500
RATIO = {
    "distinct": (RecursiveRejection(replacement=False), Drawn((2, 2, 1))),
    "independent": (RecursiveRejection(replacement=True), Drawn((2, 2, 1), replacement=True)),
    "traversal": (Traversal(), Drawn((2, 2, 1))),
}


@pytest.mark.parametrize("rule", RATIO)
def test_ratio_tests_need_distributions(rule):
    model = target()
    verifier, tree = RATIO[rule]
    draft, noise = drafter("dflash", model), LogitsProcessorList([KeyedSampler(1, [0], [0])])
    for options, reason in (
        ({"custom_generate": speculative(draft, tree, verifier=verifier)}, "greedy decoding"),
        ({"custom_generate": speculative(draft, FixedBudget(4), verifier=verifier)}, "these were chosen"),
        (
            {
                "custom_generate": speculative(draft, tree, Multinomial(), verifier),
                "logits_processor": noise,
            },
            "keyed sampler has drawn already",
        ),
        ({"custom_generate": speculative(NGram(), tree, Multinomial(), verifier)}, "NGram has no"),
    ):
        with pytest.raises(StropError, match=reason):
            write(model, **options)
    spec = speculative(draft, tree, KeyedGumbel(3), verifier)
    texts = [write(model, 9, do_sample=True, top_k=0, custom_generate=spec) for _ in range(2)]
    assert torch.equal(*texts) and texts[0].shape[1] == 17  # the text's last token is drafted for nothing
    spec = speculative(draft, tree, KeyedGumbel(3), verifier)
    cache = KVarN(group=16, tail=16, sinks=4, max_rollback=4).new_cache(model.config)
    with pytest.raises(StropError, match=r"10 nodes exceeds the 4 that fit"):
        write(model, do_sample=True, top_k=0, custom_generate=spec, past_key_values=cache)


class FirstIs(LogitsProcessor):
    """Leaves one choice for the token behind the prompt, and halves the scores of all others."""

    def __init__(self, prompt: int, token: int) -> None:
        self.prompt, self.token = prompt, token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self.prompt:
            return scores / 2
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


@pytest.mark.parametrize("rule", RATIO)
@torch.no_grad()
def test_two_tokens_of_a_drawn_tree_follow_the_target(rule):
    """The joint distribution of the first two tokens of a round, half of the runs with keyed noise."""
    model, prompt = target("qwen3", 6, V), [1, 4, 2]
    draft, (verifier, tree) = DFlashDrafter(net(model, 6, block=4), model), RATIO[rule]
    ends = torch.tensor([[*prompt, 5, x] for x in range(V)])
    p = (model(ends).logits[:, 3:].double() / 2).softmax(-1)
    joint = (p[0, 0, :, None] * p[:, 1]).flatten()
    options = {
        "logits_processor": LogitsProcessorList([FirstIs(3, 5)]),
        "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(6)]),
        "generation_config": GenerationConfig(max_length=8, do_sample=True),
    }
    spec = speculative(draft, tree, Multinomial(), verifier)
    counts, both = torch.zeros(V * V, dtype=torch.float64), 0
    torch.manual_seed(len(rule))
    for run in range(RUNS):
        if run >= RUNS // 2:
            spec.sampler = KeyedGumbel(run)
        text = spec(model, torch.tensor([prompt]), **options)[0].tolist()
        assert text[:4] == [*prompt, 5] and len(text) == 6
        counts[text[4] * V + text[5]] += 1
        both += spec.stats.rounds == 1
    likely = joint * RUNS >= 5
    expected = torch.cat([joint[likely], joint[~likely].sum()[None]]) * RUNS
    found = torch.cat([counts[likely], counts[~likely].sum()[None]])
    assert 8 < likely.sum() < V * V and both > RUNS / 5
    assert chisquare(found.numpy(), expected.numpy()).pvalue > 0.001


@pytest.mark.parametrize("kind", DRAFTERS)
def test_statistics_add_up(kind):
    model, total = target("llama", 2), Stats()
    plain = write(model, 50)
    draft = drafter(kind, model)
    draft.known = plain[0].tolist()
    for tree, most in ((FixedBudget(16), 16), (Chain(3), 3), (Throughput(cost("steep")), 0)):
        spec = speculative(draft, tree)
        assert torch.equal(write(model, 50, custom_generate=spec), plain)
        stats = spec.stats
        assert stats.rounds == sum(stats.accepted.values()) == sum(stats.nodes.values())
        assert stats.emitted == sum((k + 1) * count for k, count in stats.accepted.items()) == 49
        assert max(stats.nodes) <= most and max(stats.accepted) <= most
        assert stats.tau == 49 / stats.rounds and min(stats.seconds.values()) > 0 < stats.prefill_s
        assert bool(stats.predicted_s) == isinstance(tree, Throughput)
        total = total + stats
    told = total.to_dict()
    assert told["emitted"] == 3 * 49 and told["spec_verify_ct"] == total.rounds > 49
    assert told["spec_accept_length"] == 3 * 49 / total.rounds
    assert sum(told["accepted_by_depth"].values()) == sum(told["nodes_by_round"].values()) == total.rounds
    assert told["tokens_per_s"] > 0 and told["predicted_tokens_per_s"] > 0


def test_each_generation_starts_anew():
    """Statistics and the drafter's state; and a model is looked at once."""
    model, liar = target(), Liar()
    spec, other = speculative(drafter("dflash", model), FixedBudget(8)), target("qwen3", 1)
    first = write(model, custom_generate=spec), spec.stats
    write(model, 13, IDS[:, :5], custom_generate=spec)
    again = write(model, custom_generate=spec), spec.stats
    assert torch.equal(first[0], again[0]) and first[1].accepted == again[1].accepted
    assert first[1] is not again[1]
    spec = speculative(liar, FixedBudget(8))
    for one in (model, other, model):
        assert torch.equal(write(one, custom_generate=spec), write(one)) and spec.bound[0] is one
