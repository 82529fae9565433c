"""Speculation writes what plain decoding writes, token by token, whatever is drafted."""

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from counts import count
from drafting import DRAFTERS, Liar, cost, drafter, target
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from strop.core.sampling import KeyedSampler
from strop.decode import (
    Chain,
    Drawn,
    FixedBudget,
    KeyedGumbel,
    Throughput,
    load_drafter,
    speculative,
)
from strop.decode.speculative import Speculative
from strop.decode.stop import StopRule
from strop.decode.tree import DraftTree
from strop.decode.verify import AncestralWalk, Judge, Verdict
from strop.kv import KIVI, KVarN
from strop.model import load

CLOSE = 1e-5
"""Logits nearer to one another than this may change places with the shape of a matrix product."""
WEIGHTS = {"qwen3": 0, "llama": 1, "gpt2": 2}

every_drafter = pytest.mark.parametrize("kind", DRAFTERS)
every_model = pytest.mark.parametrize(("name", "seed"), WEIGHTS.items(), ids=WEIGHTS)


class Restless(StopRule):
    """Another budget in every round, none at all among them."""

    most = 40

    def __init__(self) -> None:
        self.round = 0

    def size(self, deltas: Iterator[float], context: int) -> int:
        self.round += 1
        return sum(1 for _ in islice(deltas, (self.round * 7) % 41 * (self.round % 3 > 0)))


TREES = {
    "chain": Chain,
    "short chain": lambda: Chain(2),
    "budget 1": lambda: FixedBudget(1),
    "budget 4": lambda: FixedBudget(4),
    "budget 16": lambda: FixedBudget(16),
    "budget 64": lambda: FixedBudget(64),
    "throughput": lambda: Throughput(cost("affine"), most=48),
    "throughput of all rounds": lambda: Throughput(cost("affine"), price="global", most=48),
    "steep": lambda: Throughput(cost("steep")),
    "flat": lambda: Throughput(cost("flat"), mode="scan", most=60),
    "buckets": lambda: Throughput(cost("flat"), mode="buckets", edges=(1, 8, 32)),
    "restless": Restless,
}


def prompts(count: int, length: int = 8, seed: int = 0, vocabulary: int = 61) -> Tensor:
    return torch.randint(2, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def write(
    model: PreTrainedModel, ids: Tensor, tokens: int, spec: Speculative | None = None, **options
) -> Tensor:
    """The text that a model writes behind `ids` `[B, T]`, greedy by default."""
    options = {"do_sample": False, "pad_token_id": 0, **options}
    if spec is not None:
        options["custom_generate"] = spec
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)


def identical(model: PreTrainedModel, out: Tensor, plain: Tensor) -> None:
    """Fails with the first place where two texts part, and how near the two tokens' logits are there."""
    if torch.equal(out, plain):
        return
    assert out.shape == plain.shape
    place = int((out != plain).nonzero()[0, -1])
    logits = model(plain[:, :place]).logits[0, -1]
    gap = float(logits[plain[0, place]] - logits[out[0, place]])
    pytest.fail(f"parts at {place}, logits {gap:.1e} apart: {'a tie' if abs(gap) < CLOSE else 'wrong'}")


@pytest.mark.soak
@every_model
def test_many_prompts(name, seed):
    model, ids = target(name, seed), prompts(count(40, 200), seed=seed)
    liar = Liar(seed, horizon=40, truth=0.99)
    specs = [speculative(liar, TREES[tree]()) for tree in ("chain", "budget 16", "chain", "chain")]
    taus = []
    for i, plain in enumerate(write(model, ids, 128).split(1)):
        liar.known, spec = plain[0].tolist(), specs[i % len(specs)]
        identical(model, write(model, ids[i : i + 1], 128, spec), plain)
        taus.append(spec.stats.tau)
    assert sum(taus) / len(taus) > 8


@every_drafter
@every_model
def test_every_tree_of_every_drafter(kind, name, seed):
    model, ids = target(name, seed), prompts(1, 11, seed + 1)
    plain = write(model, ids, 30).split(1)
    draft = drafter(kind, model, seed)
    taken = {}
    for tree, make in TREES.items():
        spec, taken[tree] = speculative(draft, make()), 0
        for i, text in enumerate(plain):
            draft.known = text[0].tolist()  # heeded by the liar alone
            identical(model, write(model, ids[i : i + 1], 30, spec), text)
            taken[tree] += 29 - spec.stats.rounds
        if tree == "steep":
            assert set(spec.stats.nodes) == {0} and spec.stats.rounds == 29
        elif tree == "flat" and kind in ("dflash", "treeflash"):
            assert max(spec.stats.nodes) == 60
        elif tree == "restless":
            assert len(spec.stats.nodes) > 3 and spec.stats.nodes[0]
    assert taken["budget 64"] > 0 or kind == "ngram"


@pytest.fixture(scope="module")
def coder():
    return load("zoo:coder", dtype="fp32")


TEXTS = (
    "def mean(values):\n    total = 0\n",
    "import os\n\n\nclass Reader:\n    def __init__(self, path):\n",
    "for name in sorted(names):\n    if name",
)
CACHES = {
    "dense": None,
    "kvarn": KVarN(group=16, tail=16, sinks=4, max_rollback=12),
    "kivi": KIVI(group=16, tail=16, sinks=4, max_rollback=12),
}


@pytest.mark.parametrize("method", CACHES.values(), ids=CACHES)
def test_the_coder_with_its_own_drafters_over_every_cache(method, coder):
    lm = coder.with_(kv=method)
    taus = []
    for i, text in enumerate(TEXTS):
        ids = torch.tensor([lm.encode(text)])
        plain = torch.tensor([[*ids[0].tolist(), *lm.generate_ids(ids.tolist(), 48)[0]]])
        for name in ("ngram", "zoo:coder-dflash", "zoo:coder-treeflash"):
            spec = speculative(load_drafter(name, lm.model), (Chain(), FixedBudget(12), Restless())[i])
            if method is not None and i == 2:
                spec.tree.rule.most = 12
            identical(lm.model, write(lm.model, ids, 48, spec, past_key_values=lm.new_cache()), plain)
            taus.append(spec.stats.tau)
    assert min(taus) > 1.2 and max(taus) > 3.5


SETTINGS = [("liar", t, top_p, top_k) for t in (0.5, 1.0, 1.5) for top_p, top_k in ((1.0, 0), (0.9, 7))]
SETTINGS += [(kind, 1.0, 0.9, 0) for kind in DRAFTERS]


@pytest.mark.parametrize(("kind", "temperature", "top_p", "top_k"), SETTINGS)
def test_keyed_sampling(kind, temperature, top_p, top_k):
    model, ids = target("llama", 3), prompts(1, seed=3)
    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    draft, trees = drafter(kind, model), [FixedBudget(24), Chain()]
    if kind in ("dflash", "treeflash", "liar"):
        trees += [Drawn((3, 2, 2)), Drawn((3, 2), replacement=True)]
    texts, accepted = set(), 0
    for seed in (1, 2):
        noise = KeyedSampler(seed, [0], [0])
        plain = write(model, ids, 24, logits_processor=LogitsProcessorList([*warpers, noise]))
        texts.add(tuple(plain[0].tolist()))
        draft.known = plain[0].tolist()
        for tree in trees:
            spec = speculative(draft, tree, KeyedGumbel(seed))
            identical(model, write(model, ids, 24, spec, do_sample=True, **asked), plain)
            accepted += 23 - spec.stats.rounds
            spec = speculative(draft, tree if not isinstance(tree, Drawn) else FixedBudget(7))
            keyed = LogitsProcessorList([*warpers, noise])
            identical(model, write(model, ids, 24, spec, logits_processor=keyed), plain)
    assert len(texts) == 2 and (accepted or kind == "ngram")


def test_sampling_follows_torchs_seed():
    model, ids = target(), prompts(1)
    spec = speculative(drafter("dflash", model), FixedBudget(16))
    texts = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        texts.append(write(model, ids, 20, spec, do_sample=True, top_k=0))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


class Recorder(LogitsProcessor):
    """Notes what it is shown, and lets it decide the scores."""

    def __init__(self) -> None:
        self.shown: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.shown.append(input_ids[0].tolist())
        return scores.roll(int(input_ids[0, -3:].sum()) % 7, -1)


class Curious(AncestralWalk):
    """Asks for the target's token at every node, those of no accepted path too."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []
        self.paths: set[tuple[int, ...]] = set()

    def verify(self, tree: DraftTree, judge: Judge) -> Verdict:
        self.texts.append(judge.text[0].tolist())
        for end in range(len(tree)):
            path = tree.path(end)
            self.paths.add((*self.texts[-1], *(tree.token[node] for node in path[1:])))
            judge.token(path)
        return super().verify(tree, judge)


MEMORIES = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 3},
    "min_new_tokens": {"min_new_tokens": 25, "eos_token_id": [3, 7, 11, 19, 23, 29]},
    "all": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [9, 4]]},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "keyed"])
@pytest.mark.parametrize("kind", ["ngram", "treeflash", "liar"])
def test_processors_with_memory(kind, sample, memory):
    model, ids, options = target("qwen3", 4), prompts(1, 9, 4), MEMORIES[memory]
    noise = [KeyedSampler(9, [0], [0])] if sample else []
    plain = write(model, ids, 30, logits_processor=LogitsProcessorList(noise), **options)
    draft = drafter(kind, model)
    draft.known = plain[0].tolist()
    for tree in (FixedBudget(20), Chain()):
        spec = speculative(draft, tree, KeyedGumbel(9) if sample else None)
        identical(model, write(model, ids, 30, spec, do_sample=sample, top_k=0, **options), plain)


@every_drafter
def test_processors_see_each_nodes_own_path(kind):
    model, ids, record, curious = target("qwen3", 5), prompts(1, 9, 5), Recorder(), Curious()
    plain = write(model, ids, 30, logits_processor=LogitsProcessorList([Recorder()]))
    draft = drafter(kind, model)
    draft.known = text = plain[0].tolist()
    spec = speculative(draft, FixedBudget(12), verifier=curious)
    identical(model, write(model, ids, 30, spec, logits_processor=LogitsProcessorList([record])), plain)
    assert curious.texts and all(text[: len(before)] == before for before in curious.texts)
    prefixes = {tuple(text[:end]) for end in range(9, len(text))}
    assert set(map(tuple, record.shown)) == prefixes | curious.paths
    assert curious.paths - prefixes
