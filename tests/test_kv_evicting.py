"""The frame of eviction: what is kept where, batches, bytes, and attention over it."""

import pytest
import torch
from conftest import CONFIGS
from evicting_methods import SMALL, STORED, bookkeeping, every_exact, every_kind, every_small, prompts, stock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config

from strop.core.attention import attend_plain
from strop.core.errors import StropError
from strop.kernels.evict import keep_top
from strop.kv import (
    KVarN,
    VaSE,
    attach,
    load_cache,
    save_cache,
)
from strop.kv.base import KVShape
from strop.kv.packed_slots import PackedSlotStore
from strop.kv.slot_store import SlotStore


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
        if step >= 48:
            sizes.add(cache.bytes())
            assert 32 <= int(layer.store.held[0]) < 32 + layer.store.period
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
        must = held.gather(2, keep_top(wide, 10).long())
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


@torch.no_grad()
def test_kernels_and_plain_torch_read_tiles_alike(tiny):
    """Steps through a store with a kernel, and through one whose kernel is taken away."""
    model, logits = tiny("qwen3"), []
    for fused in (True, False):
        cache = VaSE(budget=64, buffer=8, store=KVarN(bits=2, group=16)).new_cache(model.config)
        steps = [model(**prompts(90, 60), past_key_values=cache).logits[:, -1]]
        mask = prompts(90, 60)["attention_mask"]
        for token in range(40):
            for layer in cache.attending:
                layer.store.fused = layer.store.fused if fused else None
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            ids = torch.full((2, 1), token + 2)
            steps.append(model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1])
        assert cache.attending[0].store.coded.all()
        logits.append(torch.stack(steps))
    torch.testing.assert_close(*logits, rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", [SMALL["VaSE"], STORED["VaSE in kvarn"]])
def test_a_prompt_in_inference_mode_goes_on_in_any_other(method, tiny):
    model = tiny("qwen3")
    cache = method.new_cache(model.config)
    with torch.inference_mode():
        model(**prompts(50), past_key_values=cache)
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    with torch.no_grad():
        for _ in range(20):
            out = model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    assert out.logits.isfinite().all()
    cache.check()


@torch.no_grad()
def test_a_refused_cache_is_as_it_was(tiny):
    plain = tiny("qwen3", "sdpa")
    cache = SMALL["VaSE"].new_cache(plain.config)
    with pytest.raises(StropError, match="attach"):
        plain(torch.ones(1, 5, dtype=torch.long), past_key_values=cache)
    assert cache.get_seq_length() == 0


DAMAGE = {
    "queries": lambda x: x[:, :, 1:],
    "length": lambda x: x.float(),
    "first": lambda x: x - 1,
    "positions": lambda x: x.float(),
    "values": lambda x: x.half(),
    "packed": lambda x: x * 0,
    "records": lambda x: x.float(),
    "coded": lambda x: ~x,
}


@pytest.mark.parametrize("name", DAMAGE)
@torch.no_grad()
def test_a_damaged_file_is_refused(name, tiny, tmp_path):
    model, method = tiny("qwen3"), STORED["VaSE in kvarn"]
    cache = method.new_cache(model.config)
    model(**prompts(60), past_key_values=cache)
    model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    save_cache(cache, tmp_path / "cache")
    with safe_open(tmp_path / "cache", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "cache")
    tensors[f"0.{name}"] = DAMAGE[name](tensors[f"0.{name}"]).contiguous()
    save_file(tensors, tmp_path / "cache", metadata)
    with pytest.raises(StropError, match="damaged"):
        load_cache(tmp_path / "cache", method, model.config)
