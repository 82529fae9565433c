"""One table runs every evicting method; a later method joins by one row."""

import itertools

import pytest
import torch
from conftest import CONFIGS
from exact_codec import Exact
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config

from strop.core.attention import attend_plain
from strop.core.cache import tensor_bytes
from strop.core.errors import StropError
from strop.kv import (
    KIVI,
    RKV,
    CurDKV,
    EvictLarge,
    KVarN,
    KVMethod,
    RandomEviction,
    SnapKV,
    StreamingLLM,
    VaSE,
    VaSEDKV,
    attach,
    load_cache,
    save_cache,
)
from strop.kv.base import KVShape
from strop.kv.evicting import Candidates, EvictingLayer
from strop.kv.packed_slots import PackedSlotStore
from strop.kv.rkv import redundancy
from strop.kv.slot_store import SlotStore
from strop.recipe import METHODS, Recipe

KINDS = (VaSE, VaSEDKV, SnapKV, RKV, CurDKV, StreamingLLM, RandomEviction, EvictLarge)
SMALL = {kind.__name__: kind(budget=32, buffer=8) for kind in KINDS}
SMALL |= {
    f"VaSE {sampler}": VaSE(budget=32, buffer=8, sampler=sampler) for sampler in ("multinomial", "none")
}

STORED = {
    "VaSE in kvarn": VaSE(budget=32, buffer=8, store=KVarN(bits=8, group=16)),
    "SnapKV in kivi": SnapKV(budget=32, buffer=8, store=KIVI(bits=8, group=8)),
    "DKV, every bit kept": VaSEDKV(budget=32, buffer=8, store=Exact()),
}
EXACT = SMALL | {"every bit kept": STORED["DKV, every bit kept"]}
SMALL = SMALL | STORED

every_kind = pytest.mark.parametrize("kind", KINDS)
every_small = pytest.mark.parametrize("method", SMALL.values(), ids=SMALL)
every_exact = pytest.mark.parametrize("method", EXACT.values(), ids=EXACT)


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Random prompts, padded on the left."""
    width = max(lengths)
    ids = torch.randint(2, 61, (len(lengths), width), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def stock(tiny, name: str):
    """The model under transformers' own attention; only eager knows Gemma 2's soft cap."""
    return tiny(name, "eager" if name == "gemma2" else "sdpa")


def bookkeeping(store: SlotStore) -> int:
    """Bytes of what the host notes of each row."""
    return tensor_bytes([store.length, store.first, getattr(store, "coded", None)])


def candidates(n=64, dim=16, heads=2, seed=0, seen=200, layer=0) -> Candidates:
    """Random tokens to choose among."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, heads, n, dim, generator=generator)
    queries = torch.randn(1, 2 * heads, 64, dim, generator=generator)
    positions = torch.arange(n, dtype=torch.int32).expand(1, heads, n)
    return Candidates(keys, values, positions, queries, dim**-0.5, layer, seen)


# The frame.


@every_kind
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [(30,), (40, 17, 3)], ids=str)
@torch.no_grad()
def test_a_budget_above_the_final_length_changes_nothing(kind, name, lengths, tiny):
    model, dense = tiny(name), stock(tiny, name)
    options = {
        "max_new_tokens": 14,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    cache = kind(budget=256, buffer=8).new_cache(model.config)
    out = model.generate(**prompts(*lengths), past_key_values=cache, **options)
    plain = dense.generate(**prompts(*lengths), **options)
    assert torch.equal(out.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), rtol=0, atol=1e-5)
    cache.check()


@torch.no_grad()
def test_below_the_budget_logits_are_those_of_sdpa_to_the_bit(tiny):
    model, dense = tiny("qwen3"), tiny("qwen3", "sdpa")
    caches = VaSE(budget=256, buffer=8).new_cache(model.config), DynamicCache(config=dense.config)
    ids = prompts(60)["input_ids"]
    for part in (ids[:, :40], *ids[:, 40:].split(1, 1)):
        out, plain = (
            m(part, past_key_values=cache).logits for m, cache in zip((model, dense), caches, strict=True)
        )
        assert torch.equal(out, plain)


@every_exact
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize("lengths", [(50,), (50, 33, 7)], ids=str)
@torch.no_grad()
def test_attention_equals_dense_attention_masked_to_the_kept_set(method, name, lengths, tiny, monkeypatch):
    """A shadow keeps the whole history; what each KV head holds decides its mask."""
    model = tiny(name)
    cache = method.new_cache(model.config)
    history: dict[int, list] = {}
    kind = SlotStore if method.store is None else PackedSlotStore
    worst, attend, place = [], kind.attend, SlotStore.place

    def shadowed(store, query, mask, scaling, softcap):
        out = attend(store, query, mask, scaling, softcap)
        if query.shape[2] == 1:
            keys, values = (torch.cat(parts, 2) for parts in zip(*history[id(store)], strict=True))
            kept = torch.zeros(keys.shape[:3], dtype=torch.bool)
            for row, tokens in enumerate(store.tokens()):
                kept[row].scatter_(1, tokens.long() + store.first[row], True)
            kept = kept.repeat_interleave(query.shape[1] // keys.shape[1], 1)[:, :, None]
            if softcap is None:
                wanted = attend_plain(query, keys, values, kept, scaling)
                worst.append(((out - wanted).abs().max() / wanted.abs().max()).item())
        return out

    def placed(store, keys, values):
        history.setdefault(id(store), []).append((keys, values))
        place(store, keys, values)

    monkeypatch.setattr(kind, "attend", shadowed)
    monkeypatch.setattr(SlotStore, "place", placed)
    model.generate(**prompts(*lengths), past_key_values=cache, max_new_tokens=60, do_sample=False)
    cache.check()
    assert all(layer.store.columns > layer.store.keys.shape[2] for layer in cache.attending)
    if name != "gemma2":
        assert len(worst) > 50 and max(worst) < 1e-5


@every_small
@torch.no_grad()
def test_five_thousand_steps_in_constant_space(method):
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    model = attach(AutoModelForCausalLM.from_config(config).eval())
    cache = method.new_cache(model.config)
    layer = cache.attending[0]
    steps = 5000 if method is SMALL["VaSE"] else 400
    ids = torch.randint(2, 61, (steps,), generator=torch.Generator().manual_seed(1))
    sizes = set()
    for step, token in enumerate(ids):
        model.model(token.view(1, 1), past_key_values=cache)
        if step >= 40:
            sizes.add(cache.bytes())
            assert 32 <= int(layer.store.held[0]) < 40
    assert len(sizes) == 1
    assert sizes.pop() == method.kv_bytes(KVShape.of(config, 4), steps) + bookkeeping(layer.store)
    cache.check()


@torch.no_grad()
def test_newest_sinks_and_widest_always_survive(tiny, monkeypatch):
    method = VaSE(budget=32, buffer=8, sinks=3, reserve=10)
    model = tiny("qwen3")
    cache = method.new_cache(model.config)
    cuts, keep = [], SlotStore.keep

    def checked(store, rows, scores):
        live = int(store.length[rows[0]])
        held = store.positions[rows, :, :live].clone()
        wide = (store.values.amax(-1) - store.values.amin(-1))[rows, :, : live - 8]
        wide[held[:, :, : live - 8] < 3] = torch.inf
        must = held.gather(2, wide.topk(10).indices)
        keep(store, rows, scores)
        kept = store.positions[rows, :, :32]
        assert torch.equal(kept[:, :, 24:], held[:, :, -8:])
        assert (kept[:, :, None] == must[..., None]).any(-1).all()
        assert (kept[:, :, 1:] > kept[:, :, :-1]).all()
        assert set(kept[0, 0].tolist()) <= set(held[0, 0].tolist())
        cuts.append(live)

    monkeypatch.setattr(SlotStore, "keep", checked)
    model.generate(**prompts(30, 12), past_key_values=cache, max_new_tokens=90, do_sample=False)
    assert len(cuts) > 20 and set(cuts) == {40}


@every_small
@torch.no_grad()
def test_a_batch_changes_no_row(method, tiny):
    model = tiny("qwen3")
    options = {"max_new_tokens": 24, "do_sample": False}
    together = prompts(50, 33)
    out = model.generate(**together, past_key_values=method.new_cache(model.config), **options)
    for row, length in enumerate((50, 33)):
        alone = together["input_ids"][row : row + 1, 50 - length :]
        cache = method.new_cache(model.config)
        assert torch.equal(
            model.generate(alone, past_key_values=cache, **options)[0], out[row, 50 - length :]
        )


@pytest.mark.parametrize("method", [SMALL["VaSE"], SMALL["VaSEDKV"], SMALL["StreamingLLM"]])
@torch.no_grad()
def test_rows_can_be_rearranged_and_saved(method, tiny, tmp_path):
    model = tiny("qwen3")
    caches = [method.new_cache(model.config) for _ in range(2)]
    batch = prompts(50, 33, 7)
    mask = batch["attention_mask"]
    rows = torch.tensor([2, 0, 0])
    model(**batch, past_key_values=caches[0])
    model(batch["input_ids"][rows], attention_mask=mask[rows], past_key_values=caches[1])
    caches[0].reorder_cache(rows)
    mask = mask[rows]
    for step in range(30):
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        ids = torch.full((3, 1), step + 2)
        one, other = (model(ids, attention_mask=mask, past_key_values=cache).logits for cache in caches)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        if step == 20:
            save_cache(caches[0], tmp_path / "cache")
            caches[0] = load_cache(tmp_path / "cache", method, model.config)
    caches[0].batch_repeat_interleave(2)
    caches[0].check()
    assert len(caches[0].attending[0].store.length) == 6


@pytest.mark.parametrize("store", [None, KVarN(bits=2, group=64)], ids=str)
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_every_method_knows_its_bytes(kind, dtype, store):
    config = Qwen3Config(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    method = kind(budget=256, store=store)
    model = attach(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())
    shape = KVShape.of(config, dtype.itemsize)
    for tokens in (100, 256, 300, 700):
        cache = method.new_cache(model.config)
        model(torch.zeros(2, tokens - 1, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
        model(torch.zeros(2, 1, dtype=torch.long), past_key_values=cache)
        notes = sum(bookkeeping(layer.store) for layer in cache.attending)
        assert cache.bytes() == 2 * method.kv_bytes(shape, tokens) + notes


@torch.no_grad()
def test_reads_a_long_prompt_in_blocks(tiny):
    """A later block counts as decoding: what it makes due is evicted behind it."""
    model = tiny("qwen3")
    cache = SMALL["VaSE"].new_cache(model.config)
    for part in prompts(150)["input_ids"].split(30, 1):
        model(part, past_key_values=cache)
        cache.check()
    assert cache.attending[0].store.length.tolist() == [32] and cache.get_seq_length() == 150


# Scores.


def test_gumbel_top_k_is_sampling_without_replacement():
    """Inclusion frequencies of both samplers over 20,000 draws."""
    method = {
        sampler: VaSE(budget=24, buffer=8, reserve=4, sinks=0, smooth=1, sampler=sampler)
        for sampler in ("gumbel", "multinomial")
    }
    held = candidates(n=32, heads=1)
    held = held._replace(keys=3 * held.keys)  # so that the weights are far from even
    counts = {}
    for sampler, vase in method.items():
        total = torch.zeros(32)
        for seen in range(20_000):
            scores = vase.scores(held._replace(seen=seen))[0, 0]
            total[scores.topk(16).indices] += 1
        counts[sampler] = total / 20_000
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
