"""One table runs every kv method; a later method joins by one row."""

import itertools

import pytest
import torch
from conftest import CONFIGS
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config, cache_utils

from strop.core.cache import tensor_bytes
from strop.core.errors import StropError
from strop.kv import KIVI, HadamardRTN, KVarN, KVMethod, Quantized, attach
from strop.kv.base import KVShape

PRESETS = {"k4v4": (4, 4), "k4v2": (4, 2), "k2v2": (2, 2)}
METHODS: dict[str, KVMethod] = {
    f"kvarn {preset} g{group} {aux}": KVarN(bits_k=k, bits_v=v, group=group, tail=group, aux_dtype=aux)
    for (preset, (k, v)), group, aux in itertools.product(PRESETS.items(), (128, 64), ("fp16", "fp8"))
}
METHODS |= {
    "kvarn without normalization": KVarN(bits=2, normalize="none"),
    "kivi k2v2": KIVI(bits=2),
    "hadamard k2v2": HadamardRTN(bits=2),
    "hqq int4": Quantized(backend="hqq", group=16),
    "hqq int2": Quantized(backend="hqq", bits=2, group=8),
    "quanto int4": Quantized(backend="quanto", group=32),
    "quanto int2": Quantized(backend="quanto", bits=2, group=32),
}
if hasattr(cache_utils, "Fp8QuantizedLayer"):
    METHODS["fp8"] = Quantized(backend="fp8", bits=8)

TILED = {
    "kvarn": KVarN(bits=2, group=16, tail=16, sinks=4),
    "kvarn fp8": KVarN(group=16, tail=24, sinks=0, aux_dtype="fp8"),
    "hadamard": HadamardRTN(bits=2, group=16, tail=16, sinks=4),
    "kivi": KIVI(bits=2, group=16, tail=16, sinks=4),
}

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_tiled = pytest.mark.parametrize("method", TILED.values(), ids=TILED)


def prompt(*lengths: int) -> dict[str, torch.Tensor]:
    """Random prompts, padded on the left."""
    width = max(lengths)
    ids = torch.randint(2, 61, (len(lengths), width), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@every_method
@torch.no_grad()
def test_every_method_generates_less_bytes_alike_every_time(method, tiny):
    model, inputs = tiny("qwen3"), prompt(460, 300)
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    dense = DynamicCache(config=model.config)
    plain = model.generate(**inputs, past_key_values=dense, **options)
    runs = []
    for _ in range(2):
        cache = method.new_cache(model.config)
        runs.append(model.generate(**inputs, past_key_values=cache, **options))
        assert cache.get_seq_length() == 465
        assert tensor_bytes(cache.layers) < 0.9 * tensor_bytes(dense.layers)
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert runs[0].sequences.shape == plain.sequences.shape
    assert torch.equal(runs[0].sequences[:, 460], plain.sequences[:, 460])  # the prompt is read exactly
    assert torch.stack(runs[0].logits).isfinite().all()
    assert not torch.equal(torch.stack(runs[0].logits), torch.stack(plain.logits))


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_every_method_knows_its_bytes(method, dtype):
    config = Qwen3Config(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = attach(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())
    shape = KVShape.of(config, dtype.itemsize)
    for tokens in (512, 1024, 2048):
        cache = method.new_cache(model.config)
        model(torch.zeros(1, tokens - 2, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
        for _ in range(2):
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
        held = tensor_bytes(cache.layers)
        if not isinstance(method, Quantized):
            listed = [list(vars(layer.store).values()) for layer in cache.attending]
            assert held == cache.bytes() == tensor_bytes(listed)
        assert held == pytest.approx(method.kv_bytes(shape, tokens), rel=0.03)


@pytest.mark.parametrize("method", [None, KVarN(group=8, tail=8, sinks=4)])
@torch.no_grad()
def test_formula_counts_windows(method, tiny):
    model = tiny("gemma2")
    shape = KVShape.of(model.config, 4)
    assert shape.layers == 1 and shape.windows == (12,)
    cache = method.new_cache(model.config) if method else DynamicCache(config=model.config)
    model(torch.ones(1, 80, dtype=torch.long), past_key_values=cache)
    model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    formula = method.kv_bytes(shape, 81) if method else shape.dense_bytes(81)
    assert tensor_bytes(cache.layers) == pytest.approx(formula, rel=0.03)


@every_tiled
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2"])
@torch.no_grad()
def test_without_attach_the_tokens_are_the_same(method, name, tiny):
    """Up to what one code of two bits can do that lies on an edge and is rounded the other way."""
    models = tiny(name), tiny(name, "eager" if name == "gemma2" else "sdpa")
    caches = [method.new_cache(model.config) for model in models]
    ids = prompt(90, 90)["input_ids"]
    apart = []
    for start, stop in ((0, 50), (50, 51), (51, 60), *((at, at + 1) for at in range(60, 90))):
        out, plain = (
            model(ids[:, start:stop], past_key_values=cache).logits
            for model, cache in zip(models, caches, strict=True)
        )
        apart.append((out - plain).abs().amax(-1))
    apart = torch.cat(apart, 1)
    assert apart.max() < 2e-3 and (apart < 2e-4).float().mean() > 0.9
    assert all(len(layer.store.records) > 4 for cache in caches for layer in cache.attending)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_eight_bits_are_nearly_dense(name, tiny):
    model, ids = tiny(name), prompt(120, 120)["input_ids"]
    caches = (
        KVarN(bits=8, group=16, tail=16, sinks=4).new_cache(model.config),
        DynamicCache(config=model.config),
    )
    out, plain = (
        torch.cat([model(part, past_key_values=cache).logits for part in ids.split(10, 1)], 1)
        for cache in caches
    )
    error = (out - plain).norm(dim=-1) / plain.norm(dim=-1)
    assert 0 < error.median() < 0.02  # not the mean: a token may go to another expert


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_runs_in_every_mode_and_dtype(mode, dtype, tiny):
    model = tiny("qwen3", "strop", dtype)
    cache = KVarN(bits=2, group=16, tail=16, sinks=4).new_cache(model.config)
    with mode():
        logits = [model(**prompt(60, 30), past_key_values=cache).logits]
        mask = prompt(60, 30)["attention_mask"]
        for _ in range(40):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            ids = logits[-1][:, -1:].argmax(-1)
            logits.append(model(ids, attention_mask=mask, past_key_values=cache).logits)
    assert logits[-1].dtype == dtype and logits[-1].isfinite().all()
    cache.check()


@pytest.mark.parametrize("dim", [24, 96])
@torch.no_grad()
def test_head_sizes_that_are_not_powers_of_two(dim):
    config = Qwen3Config(**{**CONFIGS["qwen3"].to_dict(), "head_dim": dim})
    for method in (KVarN(), HadamardRTN()):
        with pytest.raises(StropError, match=r"^head size \d+ .*kivi"):
            method.new_cache(config)
    model = attach(AutoModelForCausalLM.from_config(config).eval())
    cache = TILED["kivi"].new_cache(model.config)
    model.generate(**prompt(60, 30), past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert len(cache.attending[0].store.records)
    cache.check()


def test_peers_refuse_shapes_that_break_them():
    """HQQ packs several groups to a byte: some lengths fail in mid-generation unless a token fills bytes."""
    config = Qwen3Config(**{**CONFIGS["qwen3"].to_dict(), "num_key_value_heads": 1})
    for method in (Quantized(bits=2), Quantized(), Quantized(backend="quanto")):
        with pytest.raises(StropError, match="smaller group"):
            method.new_cache(config)
    with pytest.raises(StropError, match="refuses this model"):
        Quantized(group=16).new_cache(CONFIGS["gemma2"])


@pytest.mark.parametrize("fields", [{"backend": "gguf"}, {"bits": 8}, {"backend": "fp8", "bits": 4}])
def test_peers_check_their_fields(fields):
    with pytest.raises(ValueError):
        Quantized(**fields)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (KVarN(), "k4v2"),
        (KVarN(bits=2, sinks=4), "k2v2 sinks=4"),
        (KIVI(bits_k=2, aux_dtype="fp8"), "k2v2 aux_dtype=fp8"),
        (Quantized(group=32), "hqq int4 group=32"),
    ],
)
def test_settings_for_people(method, text):
    assert method.settings() == text
