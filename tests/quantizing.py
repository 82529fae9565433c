"""Tiny models and checkpoints that the tests of weights share: dense ones and mixtures of experts."""

import copy
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from strop.core.hooks import decoder_layers
from strop.weights.linear import PackedLinear

END = "<end>"
SHAPE = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 0,
}
SMALL = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1}
CONFIGS = {
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "gpt2": GPT2Config(
        vocab_size=257, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=0
    ),
    "qwen2_moe": Qwen2MoeConfig(**SHAPE, **SMALL, shared_expert_intermediate_size=96),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, **SMALL, head_dim=16),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2),
    "deepseek_v2": DeepseekV2Config(
        **SHAPE | {"num_key_value_heads": 4}, **LATENT, **ROUTED, topk_group=1, v_head_dim=16,
        moe_intermediate_size=64, num_experts_per_tok=2,
    ),
}  # fmt: skip
EXPERTS = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2")
TOKENS = torch.arange(34).reshape(2, 17) * 7 % 257


def build(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """Seeded noise of an architecture."""
    config = copy.deepcopy(CONFIGS[name])
    config.update(changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def save(model: PreTrainedModel, folder: Path, shard: str = "50GB") -> Path:
    """A checkpoint as transformers itself writes it, with a tokenizer of bytes."""
    model.save_pretrained(folder, max_shard_size=shard)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([END, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All stored tensors of a folder."""
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            found |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return found


def store(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put other tensors into a folder of one shard."""
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def rows(asked: object) -> Tensor:
    """Calibration text: a few rows of noise."""
    return torch.randint(257, (4, 32), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def memory(model: nn.Module) -> int:
    """Bytes of all distinct storages."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def experts_of(model: nn.Module, layer: int = 0) -> nn.Module:
    """The experts of a layer: fused as transformers has them, or split."""
    return decoder_layers(model)[layer].mlp.experts
