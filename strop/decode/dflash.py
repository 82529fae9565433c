"""DFlash (arXiv 2602.06036): a block of masked tokens is denoised in one pass over the target's own features.

Outputs of some of the target's layers are fused into one vector a token, `c`, and every draft layer projects
`c` to keys and values beside those of its block: slot 0 holds the anchor, slots 1 to N - 1 the mask token,
and slot i predicts the token at its own place. Embedding and head are the target's.

Left out: sliding-window draft layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from strop.decode.drafter import Drafter
from strop.decode.proposal import Proposal, marginals

Past = tuple[Tensor, Tensor]
"""Keys and values of the context, `[B, H_kv, T, D]` each."""


def default_taps(target_layers: int, draft_layers: int) -> list[int]:
    """The target's layers to read for a drafter of some depth, evenly spread."""
    if draft_layers == 1:
        return [target_layers // 2]
    return [round(1 + i * (target_layers - 4) / (draft_layers - 1)) for i in range(draft_layers)]


class Attention(nn.Module):
    """Block queries over context and block, not causal."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        d, self.dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(d, config.num_attention_heads * self.dim, bias=False)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.dim, d, bias=False)
        self.q_norm = Qwen3RMSNorm(self.dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.dim, eps=config.rms_norm_eps)

    def forward(
        self, h: Tensor, c: Tensor, angles: Past, past: "ContextKV | None", mask: Tensor | None
    ) -> Tensor:
        """`h` `[B, n, d]` and the context `c` `[B, m, d]` before it; `angles` are of all m + n positions."""
        given, (cos, sin) = torch.cat([c, h], dim=1), angles
        query = self.q_norm(self._heads(self.q_proj(h)))
        keys, values = self.k_norm(self._heads(self.k_proj(given))), self._heads(self.v_proj(given))
        own = slice(c.shape[1], None)
        query, _ = apply_rotary_pos_emb(query, query, cos[:, own], sin[:, own])
        keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
        if past is not None:
            keys, values = past.extend(keys, values, c.shape[1])
        out = scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.dim)).transpose(1, 2)


class Layer(nn.Module):
    """A pre-norm transformer layer whose attention reads the context as well."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, h: Tensor, c: Tensor, angles: Past, past: "ContextKV | None", mask: Tensor | None
    ) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), c, angles, past, mask)
        return h + self.mlp(self.post_attention_layernorm(h))


class DFlashNet(nn.Module):
    """The network, under the names of the published checkpoints; it owns neither embedding nor head."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        d, taps = config.hidden_size, config.dflash_config["target_layer_ids"]
        self.fc = nn.Linear(len(taps) * d, d, bias=False)
        self.hidden_norm = Qwen3RMSNorm(d, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = Qwen3RMSNorm(d, eps=config.rms_norm_eps)
        self.rotary = Qwen3RotaryEmbedding(config)

    def forward(
        self,
        h: Tensor,
        features: Tensor,
        positions: Tensor,
        past: Sequence["ContextKV"] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Denoise blocks; returns `[B, n, d]` before the final norm.

        `h` `[B, n, d]` embeds the block, `features` `[B, m, k * d]` are the target's for context that `past`
        does not hold yet, `positions` `[B, m + n]` are those of context and block, and `mask` bool
        `[B, 1, n, T + n]` says what each slot sees, everything by default.
        """
        c = self.hidden_norm(self.fc(features))
        angles = self.rotary(h, positions)
        for i, layer in enumerate(self.layers):
            h = layer(h, c, angles, None if past is None else past[i], mask)
        return h


class ContextKV:
    """Keys and values of the context in one draft layer, in a buffer that doubles when it is full."""

    def __init__(self) -> None:
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor, context: int) -> Past:
        """Keep the first `context` of the new entries and return all, with the block's own behind them."""
        end = self.length + keys.shape[2]
        if self.keys is None or end > self.keys.shape[2]:
            self.keys, self.values = (
                self._grown(old, new, 2 * end) for old, new in ((self.keys, keys), (self.values, values))
            )
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length += context
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grown(self, old: Tensor | None, new: Tensor, capacity: int) -> Tensor:
        buffer = new.new_empty(*new.shape[:2], capacity, new.shape[3])
        if old is not None:
            buffer[:, :, : self.length] = old[:, :, : self.length]
        return buffer


class DFlashDrafter(Drafter):
    """Proposes one marginal distribution a slot."""

    def __init__(self, net: DFlashNet, target: PreTrainedModel) -> None:
        config = net.config
        self.net = net.eval()
        self.embed, self.head = target.get_input_embeddings(), target.get_output_embeddings()
        self.horizon = config.block_size - 1
        self.tap_layers = tuple(config.dflash_config["target_layer_ids"])
        self.about = f"{config.num_hidden_layers} x {config.hidden_size}, {config.intermediate_size}, "
        self.about += f"block {config.block_size}, taps {self.tap_layers}"
        self.masks = [config.dflash_config["mask_token_id"]] * self.horizon
        self.modules: list[nn.Module] = [net]
        self.reset()

    def bytes(self, context: int) -> int:
        weights = [parameter for module in self.modules for parameter in module.parameters()]
        config = self.net.config
        entries = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return sum(weight.nbytes for weight in weights) + context * entries * weights[0].element_size()

    def reset(self) -> None:
        self.past = [ContextKV() for _ in self.net.layers]
        self.pending: list[Tensor] = []
        self.first = 0

    def inject(self, features: Tensor, first: int) -> None:
        if not self.pending:
            self.first = first
        self.pending.append(features)

    def propose(self, ids: Sequence[int], width: int) -> Proposal:
        return marginals(self.head(self.net.norm(self.slots(ids[-1]))), width)

    def sample(self, ids: Sequence[int]) -> Proposal:
        return marginals(self.head(self.net.norm(self.slots(ids[-1]))), 1, sampled=True)

    def slots(self, anchor: int) -> Tensor:
        """The drafted slots `[L, d]` behind an anchor, before the final norm."""
        features = torch.cat(self.pending)[None]
        self.pending = []
        size = features.shape[1] + self.horizon + 1
        block = torch.tensor([[anchor, *self.masks]], device=features.device)
        positions = torch.arange(self.first, self.first + size, device=features.device)[None]
        return self.net(self.embed(block), features, positions, self.past)[0, 1:]
