"""What each evicting method scores, and what none of them takes."""

import itertools

import pytest
import torch
from conftest import CONFIGS
from counts import count
from evicting_methods import KINDS, SMALL, candidates, every_small, prompts

from strop.core.errors import StropError
from strop.kv import (
    RKV,
    CurDKV,
    EvictLarge,
    KVarN,
    KVMethod,
    Press,
    RandomEviction,
    SnapKV,
    StreamingLLM,
    VaSE,
    VaSEDKV,
)
from strop.kv.evicting import EvictingLayer
from strop.kv.rkv import redundancy
from strop.recipe import LONG, METHODS, Recipe
from strop.recipe import candidates as candidates_of

DRAWS = count(8000, 20_000)


def test_gumbel_top_k_is_sampling_without_replacement():
    """Inclusion frequencies of both samplers over many draws."""
    method = {
        sampler: VaSE(budget=24, buffer=8, reserve=4, sinks=0, smooth=1, sampler=sampler)
        for sampler in ("gumbel", "multinomial")
    }
    held = candidates(n=32, heads=1)
    held = held._replace(keys=3 * held.keys)  # so that the weights are far from even
    counts = {}
    for sampler, vase in method.items():
        total = torch.zeros(32)
        for seen in range(DRAWS):
            scores = vase.scores(held._replace(seen=seen))[0, 0]
            total[scores.topk(16).indices] += 1
        counts[sampler] = total / DRAWS
    assert (counts["gumbel"] - counts["multinomial"]).abs().max() < 0.02
    free = counts["gumbel"][counts["gumbel"] < 1]
    assert free.min() < 0.25 and free.max() > 0.7


def test_every_token_keeps_the_chance_that_the_bound_promises():
    """pi >= 1 - (1 - alpha / Z) ** places for a token without a reserved place; ranking gives zero."""
    vase = VaSE(budget=24, buffer=8, reserve=4, sinks=0)
    held = candidates(n=32, heads=1)
    attention = vase.attention(held)[0, 0]
    kept = torch.zeros(32)
    for seen in range(4000):
        scores = vase.scores(held._replace(seen=seen))[0, 0]
        kept[scores.topk(16).indices] += 1
    reserved = kept == 4000
    share = attention.masked_fill(reserved, 0)
    bound = 1 - (1 - share / share.sum()) ** 12
    assert (kept / 4000 >= bound - 0.03)[~reserved].all() and (kept > 0).all()
    ranked = VaSE(budget=24, buffer=8, reserve=4, sinks=0, sampler="none")
    alike = {
        tuple(ranked.scores(held._replace(seen=seen))[0, 0].topk(16).indices.tolist()) for seen in range(9)
    }
    assert len(alike) == 1  # so that 16 of the 32 never stay


def test_projections_are_fresh_or_frozen():
    held = candidates(n=200)

    def kept(method: KVMethod, seen: int) -> set[int]:
        return set(method.scores(held._replace(seen=seen))[0, 0].topk(56).indices.tolist())

    dkv, cur = VaSEDKV(budget=64, buffer=8), CurDKV(budget=64, buffer=8)
    assert kept(dkv, 300) != kept(dkv, 364) and kept(dkv, 300) == kept(dkv, 300)
    assert kept(cur, 300) == kept(cur, 364)
    assert {0, 1, 2, 3} <= kept(dkv, 300) & kept(cur, 300)


def test_seeds_and_layers_differ_and_repeat():
    held = candidates(n=200)
    for kind in (VaSE, VaSEDKV, RandomEviction):
        scores = [kind(budget=64, buffer=8, seed=seed).scores(held) for seed in (0, 0, 1)]
        assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
        assert not torch.equal(scores[0], kind(budget=64, buffer=8).scores(held._replace(layer=1)))


def test_redundancy_is_the_mean_cosine_similarity_with_the_others():
    keys = candidates().keys
    unit = keys / keys.norm(dim=-1, keepdim=True)
    alike = unit @ unit.transpose(-1, -2)
    alike.diagonal(dim1=-2, dim2=-1).zero_()
    torch.testing.assert_close(redundancy(keys), alike.mean(-1).softmax(-1))


def test_evict_large_and_streaming_keep_what_they_say():
    held = candidates(n=100)
    wide = (held.values.amax(-1) - held.values.amin(-1))[0, 0]
    narrow = EvictLarge(budget=64, buffer=8).scores(held)[0, 0].topk(56).indices
    assert set(narrow.tolist()) == set(wide.argsort()[:56].tolist())
    stays = StreamingLLM(budget=64, buffer=8).scores(held)[0, 0].topk(56).indices
    assert set(stays.tolist()) == {0, 1, 2, 3, *range(48, 100)}


# What goes wrong.


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (VaSE, {"budget": 64}, "above buffer"),
        (VaSE, {"budget": 100}, "multiple of buffer"),
        (VaSE, {"budget": 32, "buffer": 0}, "at least 1"),
        (VaSE, {"reserve": 2}, "sinks"),
        (VaSE, {"budget": 128, "reserve": 100}, "places"),
        (VaSE, {"sampler": "dice"}, "sampler"),
        (VaSE, {"temperature": 0.0}, "temperature"),
        (SnapKV, {"window": 0}, "window"),
        (SnapKV, {"smooth": 4}, "odd"),
        (RKV, {"weight": 2.0}, "weight"),
        (CurDKV, {"rank": 0}, "rank"),
        (StreamingLLM, {"sinks": -1}, "sinks"),
    ],
)
def test_fields_are_checked(kind, fields, says):
    with pytest.raises(ValueError, match=says):
        kind(**fields)


@torch.no_grad()
def test_what_cannot_work_is_refused_in_a_sentence(tiny):
    method = SMALL["VaSE"]
    plain = tiny("qwen3", "sdpa")
    with pytest.raises(StropError, match="attach"):
        plain(torch.ones(1, 5, dtype=torch.long), past_key_values=method.new_cache(plain.config))
    model = tiny("qwen3")
    cache = method.new_cache(model.config)
    model(torch.ones(1, 5, dtype=torch.long), past_key_values=cache)
    with pytest.raises(StropError, match="speculation"):
        cache.crop(-1)
    with pytest.raises(StropError, match="take back"):
        Recipe.from_dict({"strop": 1, "kv": "vase", "decode": "prompt_lookup"}).check()
    right = {"input_ids": torch.ones(2, 9, dtype=torch.long), "attention_mask": torch.ones(2, 9)}
    right["attention_mask"][0, 5:] = 0
    with pytest.raises(StropError, match="left"):
        model(**right, past_key_values=method.new_cache(model.config))


@every_small
@torch.no_grad()
def test_numbers_that_are_none_are_refused(method):
    layer = EvictingLayer(CONFIGS["qwen3"], method, 0)
    keys = torch.randn(1, 2, 60, 16)
    keys[0, 0, 7, 3] = torch.nan
    layer.config._attn_implementation = "strop"
    layer.update(keys, keys)
    query = torch.randn(1, 4, 60, 16)
    layer.attend(query, None, 0.25, None)
    layer.update(keys[:, :, :1], keys[:, :, :1])
    with pytest.raises(StropError, match="not numbers"):
        layer.attend(query[:, :, :1], None, 0.25, None)


def test_recipes_name_every_method():
    known = METHODS["kv"]
    for kind in KINDS:
        assert kind in known.values()
    recipe = Recipe.from_dict({"strop": 1, "kv": {"vase": {"budget": 512}}})
    assert recipe.kv == VaSE(budget=512) and Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.label() == "vase 512"


def test_window_methods_agree_on_what_they_watch():
    """Every ObservedKV sees the same attention, a row of probabilities a head."""
    held = candidates()
    for kind, smooth in itertools.product((SnapKV, VaSE, RKV), (1, 5)):
        attention = kind(budget=32, buffer=8, smooth=smooth).attention(held)
        assert attention.shape == (1, 2, 64) and (attention >= 0).all()
        assert attention.sum(-1).allclose(torch.ones(1, 2), atol=0.1)


class Norms:
    """A scorer with the signature of kvpress's, which keeps short keys as its KnormPress does."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return -keys.norm(dim=-1)


class Curious(Norms):
    """One that looks at the model."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return module.config


@torch.no_grad()
def test_a_press_scores_tokens(tiny):
    held = candidates()
    method = Press(budget=32, buffer=8, press=Norms())
    kept = method.scores(held)[0, 0].topk(24).indices
    assert set(kept.tolist()) == set(held.keys[0, 0].norm(dim=-1).argsort()[:24].tolist())
    assert method.settings() == "Norms 32 buffer=8"
    model = tiny("qwen3")
    cache = method.new_cache(model.config)
    model.generate(**prompts(50), past_key_values=cache, max_new_tokens=20, do_sample=False)
    cache.check()
    with pytest.raises(StropError, match="Curious asks for more"):
        Press(budget=32, buffer=8, press=Curious()).scores(held)
    with pytest.raises(ValueError, match="ScorerPress"):
        Press(press=object())


def test_presses_of_kvpress_serve_as_they_are():
    kvpress = pytest.importorskip("kvpress")
    for kind in (kvpress.KnormPress, kvpress.KeyDiffPress, kvpress.LagKVPress, kvpress.CURPress):
        assert Press(budget=32, buffer=8, press=kind()).scores(candidates()).shape == (1, 2, 64)
    with pytest.raises(StropError, match="asks for more"):
        Press(budget=32, buffer=8, press=kvpress.SnapKVPress()).scores(candidates())


def test_long_contexts_get_budgets_to_try():
    """Half and a quarter of the tokens, alone and over a store, as whole buffers."""
    short, long = (dict.fromkeys(candidates_of(context)["kv"]) for context in (LONG - 1, 2000))
    tried = [method for method in long if method not in short]
    assert list(short) == list(candidates_of(1)["kv"]) and list(short) == list(long)[: len(short)]
    assert {(type(m), m.budget, m.store is None) for m in tried} >= {
        (VaSE, 960, True),
        (VaSE, 448, True),
        (VaSE, 960, False),
        (VaSE, 448, False),
    }
    assert all(method.budget % method.buffer == 0 for method in tried)
    for context in (LONG, 4096):
        assert len(set(candidates_of(context)["kv"])) == len(candidates_of(context)["kv"])


@pytest.mark.parametrize(
    ("store", "says"),
    [
        ({"vase": {}}, "store cannot be vase; known: kvarn, kivi, hadamard"),
        ({"quantized": {}}, "store cannot be quantized"),
        ("streaming", "store cannot be streaming"),
        ({"kvarn": {"group": 512, "tail": 512}}, "less than one tile"),
        ("fp3", "unknown kv method"),
    ],
)
def test_stores_that_are_none_are_refused_in_a_sentence(store, says):
    with pytest.raises(StropError, match=says):
        Recipe.from_dict({"strop": 1, "kv": {"vase": {"budget": 512, "store": store}}})
    kept = Recipe.from_dict({"strop": 1, "kv": {"vase": {"budget": 512, "store": "kvarn"}}})
    assert kept.kv.store == KVarN() and Recipe.from_dict(kept.to_dict()) == kept


def test_a_store_from_python_is_checked_too():
    with pytest.raises(ValueError, match="cannot be a store"):
        VaSE(store=VaSE())


def test_a_press_has_no_name_in_recipes():
    with pytest.raises(StropError, match="from Python"):
        Recipe(kv=Press(press=Norms())).label()


def test_multinomial_with_a_full_reserve_and_alike_rows():
    full = VaSE(budget=32, buffer=8, reserve=24, sampler="multinomial").scores(candidates())
    assert (full == torch.inf).sum(-1).eq(24).all()
    one = candidates()
    fields = ("keys", "values", "positions", "queries")
    two = one._replace(**{name: torch.cat([getattr(one, name)] * 2) for name in fields})
    scores = VaSE(budget=32, buffer=8, sampler="multinomial").scores(two)
    assert torch.equal(scores[0], scores[1])
