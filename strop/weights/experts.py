"""Experts as linear layers: transformers 5 fuses those of a layer, and each needs a width of its own.

The split shares storage with the fused tensors until a matrix is swapped. Left out: experts with biases,
interleaved or missing gates, or an activation of their own (GPT-OSS, Llama 4's newest forms).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from strop.core.errors import StropError

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
FUSED = ("gate_up_proj", "down_proj")
OTHER_NAMES = (
    (r"\.mlp\.experts\.(\d+)\.gate_proj\.", r".block_sparse_moe.experts.\1.w1."),
    (r"\.mlp\.experts\.(\d+)\.down_proj\.", r".block_sparse_moe.experts.\1.w2."),
    (r"\.mlp\.experts\.(\d+)\.up_proj\.", r".block_sparse_moe.experts.\1.w3."),
    (r"\.mlp\.gate\.", r".block_sparse_moe.gate."),
)
"""How checkpoints of Mixtral's family spell what transformers 5 calls otherwise."""


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a mixture of experts."""
    text = config.get("text_config")
    told = text if isinstance(text, Mapping) and text else config
    return any(told.get(field) for field in COUNTS)


class Expert(nn.Module):
    """One gated feed-forward network, `[N, H]` to `[N, H]`."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(gate), linear(up), linear(down)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """The experts of one layer; takes the place of a module with fused tensors.

    `gate_up_proj` is `[E, 2F, H]` and `down_proj` `[E, H, F]`, or both transposed.
    """

    def __init__(self, fused: nn.Module) -> None:
        gate_up, down = fused.gate_up_proj.detach(), fused.down_proj.detach()
        transposed = getattr(fused, "is_transposed", False)
        if transposed:
            gate_up, down = gate_up.mT, down.mT
        pairs = zip(gate_up, down, strict=True)
        super().__init__(Expert(*both.chunk(2), out, fused.act_fn) for both, out in pairs)
        self.transposed = transposed

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Map `hidden` `[N, H]` through the experts `[N, k]` chosen for each token, weighted `[N, k]`."""
        out = torch.zeros_like(hidden)
        for index in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == index)
            said = self[index](hidden[token]) * top_k_weights[token, place, None]
            out.index_add_(0, token, said.to(out.dtype))
        return out


def linear(weight: Tensor) -> nn.Linear:
    """A linear layer around a matrix `[O, I]`, which it shares."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def split_experts(model: nn.Module) -> None:
    """Split all fused experts of `model` in place. Raises StropError for a form that is not known."""
    for name, module in [*model.named_modules()]:
        if all(getattr(getattr(module, key, None), "ndim", 0) == 3 for key in FUSED):
            _require_plain(name, module)
            model.set_submodule(name, Experts(module))


def of_expert(name: str) -> bool:
    """Whether a matrix of this name belongs to a routed expert."""
    return "experts" in name.split(".")


def _require_plain(name: str, fused: nn.Module) -> None:
    odd = {
        "biases": getattr(fused, "has_bias", False),
        "interleaved gates": not getattr(fused, "is_concatenated", True),
        "no gate": not getattr(fused, "has_gate", True),
        "a norm behind each expert": getattr(fused, "has_post_expert_norm", False),
        "a gate of their own": type(fused)._apply_gate.__module__ != "transformers.integrations.moe"
        if hasattr(type(fused), "_apply_gate")
        else False,
        "no activation by name": not hasattr(fused, "act_fn"),
    }
    if found := [what for what, is_so in odd.items() if is_so]:
        raise StropError(
            f"{name} has experts with {', '.join(found)}, which strop does not split: leave the weights of a "
            f"{type(fused).__name__} as they are"
        )
