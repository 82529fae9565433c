"""Tiny seeded models that tests share: two layers of nine architectures, with sharp attention."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from strop.kv import attach

VOCABULARY = 61
DENSE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4}


class Fresh(dict[str, PretrainedConfig]):
    """Architectures by name, a copy for whoever asks: models write into their configs."""

    def __getitem__(self, name: str) -> PretrainedConfig:
        return deepcopy(super().__getitem__(name))


CONFIGS = Fresh(
    qwen3=Qwen3Config(**DENSE),
    qwen2=Qwen2Config(**DENSE),
    llama=LlamaConfig(**DENSE),
    mistral=MistralConfig(**DENSE, sliding_window=None),
    gemma=GemmaConfig(**DENSE),
    gemma2=Gemma2Config(
        **DENSE,
        sliding_window=12,
        attn_logit_softcapping=5.0,
        query_pre_attn_scalar=16,
        layer_types=["full_attention", "sliding_attention"],
    ),
    gpt2=GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    ),
    qwen2_moe=Qwen2MoeConfig(**DENSE, **EXPERTS, num_experts_per_tok=2),
    mixtral=MixtralConfig(**DENSE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
)

torch.set_num_threads(1)


@cache
def tiny_model(name: str, attention: str = "strop", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).eval()
    if attention == "strop":
        return attach(model)
    model.set_attn_implementation(attention)
    return model


@pytest.fixture(scope="session")
def tiny():
    """`tiny(name, attention, dtype)`: a seeded model that tests must leave as it is."""
    return tiny_model
