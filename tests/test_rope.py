"""Keys moved after the fact: three ways to the same scores, layouts read off models, the rest refused."""

from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma3TextConfig,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PreTrainedModel,
    SmolLM3Config,
)

from strop.core.errors import StropError
from strop.core.rope import Rope

SIZES = {
    "vocab_size": 61,
    "hidden_size": 128,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
}
SCALED = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0] * 32,
        "long_factor": [2.0] * 32,
        "original_max_position_embeddings": 512,
    },
}
MOVABLE = {
    "plain": LlamaConfig(**SIZES),
    "wide": LlamaConfig(**SIZES, head_dim=128),
    **{kind: LlamaConfig(**SIZES, rope_parameters=SCALED[kind]) for kind in ("linear", "llama3", "yarn")},
    "interleaved": CohereConfig(**SIZES),
    "partial": PhiConfig(**SIZES, partial_rotary_factor=0.5),
    "partial interleaved": GlmConfig(**SIZES, head_dim=128),
}
REFUSED = {
    "dynamic": (LlamaConfig(**SIZES, rope_parameters=SCALED["dynamic"]), "length of the text"),
    "longrope": (LlamaConfig(**SIZES, rope_parameters=SCALED["longrope"]), "length of the text"),
    "by layer": (Gemma3TextConfig(**SIZES, head_dim=64), "no one rotary embedding"),
    "learned": (GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2), "no one rotary embedding"),
    "alibi": (
        FalconConfig(
            vocab_size=61,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            alibi=True,
            eos_token_id=2,
        ),
        "do not rotate",
    ),
    "some layers not": (SmolLM3Config(**SIZES, no_rope_layers=[0]), "do not rotate"),
}
every_rope = pytest.mark.parametrize("name", MOVABLE)
SHIFTS = (1, 517, 32749, 131071)
"""No powers of two, whose products with a frequency are exact in float32 as well."""


def model_of(config) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@cache
def rope_of(name: str) -> Rope:
    return Rope.of(model_of(MOVABLE[name]))


def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As kernels compute it: in float32 at least, whatever the tensors are stored in."""
    query, keys, values = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, keys, values))
    return (query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1) @ values


def three_ways(rope: Rope, groups: int, shift: int, dtype: torch.dtype) -> list[Tensor]:
    """Outputs of queries behind a document that was computed from 0 and stands at `shift`."""
    generator = torch.Generator().manual_seed(shift)
    place, shift = torch.arange(512), torch.tensor(shift)
    raw, values = torch.randn(2, 1, 512, rope.dim, generator=generator, dtype=torch.float64)
    query = torch.randn(groups, 3, rope.dim, generator=generator, dtype=torch.float64)
    query = rope.rotate(query, shift + 512 + torch.arange(3)).to(dtype)
    document, moved = rope.rotate(raw, place).to(dtype), rope.rotate(raw, shift + place).to(dtype)
    values = values.to(dtype)
    return [
        attention(rope.unrotate(query, shift), document, values),
        attention(query, rope.rotate(document, shift), values),
        attention(query, moved, values),
    ]


@every_rope
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-3)]
)
def test_turning_queries_or_keys_or_computing_keys_anew_is_the_same(name, shift, dtype, bound):
    for groups in (1, 4, 8):
        queries, keys, anew = three_ways(rope_of(name), groups, shift, dtype)
        error = max((queries - anew).abs().max(), (keys - anew).abs().max())
        assert error <= bound


def test_angles_built_in_float32_would_miss_the_bound():
    rope, shift = rope_of("llama3"), torch.tensor(131071)
    exact = rope.angles(shift, torch.float64)[0]
    frequencies = torch.tensor(rope.frequencies).float()
    naive = (shift.float() * frequencies).cos().repeat(2)
    assert (rope.angles(shift)[0] - exact).abs().max() < 1e-7 < 1e-4 < (naive - exact).abs().max()


@every_rope
def test_rotation_is_the_models_own(name):
    model, rope = model_of(MOVABLE[name]), rope_of(name)
    ids = torch.tensor([[5], [9]])
    keys = []
    for position in (0, 77, 600):
        where = torch.full_like(ids, position)
        cache = model(ids, position_ids=where, use_cache=True).past_key_values
        keys.append((position, cache.layers[0].keys))
    for position, key in keys[1:]:
        torch.testing.assert_close(rope.rotate(keys[0][1], torch.tensor(position)), key, rtol=0, atol=1e-4)
        torch.testing.assert_close(rope.unrotate(key, torch.tensor(position)), keys[0][1], rtol=0, atol=1e-4)


def test_layouts_are_told_apart():
    assert {name: rope_of(name).interleaved for name in MOVABLE} == {
        name: "interleaved" in name for name in MOVABLE
    }
    assert [2 * len(rope_of(name).frequencies) for name in ("wide", "partial", "partial interleaved")] == [
        128,
        32,
        64,
    ]


def test_a_model_in_bfloat16_is_read_as_well():
    model = model_of(MOVABLE["partial interleaved"]).bfloat16()
    assert Rope.of(model).interleaved


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_moved_is_refused(name):
    config, sentence = REFUSED[name]
    with pytest.raises(StropError, match=sentence):
        Rope.of(model_of(config))
