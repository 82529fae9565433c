"""The steps of an eviction: score slots, add keyed noise, keep the largest, compact.

The functions here are plain torch and serve every device; `evict_triton` has the same functions fused, which
never store the probabilities `[G * W, n]`. `kernels` says which to call.
"""

import sys
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from strop.core.attention import group_queries
from strop.core.sampling import uniform_at

HEAD_STRIDE = 2**24
"""Counters of the noise that one KV head may use: its positions stay below."""


@lru_cache(maxsize=8)
def kernels(device_type: str) -> ModuleType:
    """The module whose functions serve a device type: `evict_triton` on a GPU that has it, else this one."""
    if device_type == "cuda" and find_spec("triton") is not None:
        return import_module("strop.kernels.evict_triton")
    return sys.modules[__name__]


def observe(window: Tensor, keys: Tensor, lengths: Tensor, scaling: float) -> Tensor:
    """Mean attention probability of each slot, over a window of queries and the heads of a group.

    `window` `[B, H_q, W, D]`, `keys` `[B, H_kv, n, D]`; a softmax runs over the first `lengths[b]` slots.
    Returns `[B, H_kv, n]` float32, 0 beyond a row's length.
    """
    held = torch.arange(keys.shape[2], device=keys.device) < lengths[:, None]
    scores = group_queries(window, keys.shape[1]) @ keys.float().transpose(-1, -2) * scaling
    scores = scores.masked_fill(~held[:, None, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1).mean(2).where(held[:, None], 0.0)


def value_range(values: Tensor) -> Tensor:
    """max_j v_j - min_j v_j of each slot of `[B, H_kv, n, D]`: `[B, H_kv, n]` float32."""
    return values.amax(-1).float() - values.amin(-1).float()


def gumbel(log_weights: Tensor, positions: Tensor, low: int, high: int) -> Tensor:
    """Log weights `[B, H_kv, n]` plus Gumbel noise, a pure function of (low, high, KV head, position).

    `positions` `[B, H_kv, n]` int32, below 2**24; `low` and `high` are the 32-bit halves of a key.
    """
    heads = torch.arange(positions.shape[1], device=positions.device)[:, None]
    uniform = uniform_at(heads * HEAD_STRIDE + positions, low, high)
    return log_weights - (-uniform.log()).log().float()


def keep_top(scores: Tensor, count: int) -> Tensor:
    """Slots of the `count` largest of `scores` `[B, H_kv, n]` float32, ascending: `[B, H_kv, count]` int32.

    Among equals the later slot is kept; -inf comes last.
    """
    newest_first = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    kept = scores.shape[-1] - 1 - newest_first[..., :count]
    return kept.sort(-1).values.int()


def gather(cache: Tensor, kept: Tensor, lengths: Tensor, recent: int) -> None:
    """Compact `cache` `[B, H_kv, m, D]` in place: the kept slots, then the last `recent` of each row.

    `kept` `[B, H_kv, count]` ascends; `lengths` `[B]` counts the slots a row holds, recent ones included.
    Kept slots among the recent ones or beyond are left out, so that a row whose other slots are all kept
    stays as it is. What then lies behind the recent slots is not defined.
    """
    width = kept.shape[-1] + recent
    start = (lengths - recent).clamp(min=0)[:, None, None]
    chosen = (kept < start).sum(-1, keepdim=True)
    behind = start + torch.arange(width, device=kept.device) - chosen
    source = behind.clamp(max=cache.shape[2] - 1)
    source[..., : kept.shape[-1]] = torch.where(kept < start, kept, source[..., : kept.shape[-1]])
    cache[:, :, :width] = cache.gather(2, source[..., None].expand(-1, -1, -1, cache.shape[3]))
