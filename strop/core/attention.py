"""Attention over regions that are stored differently, joined by their log-sum-exp.

Each region yields its own normalised output and the log of its softmax denominator; `merge` weighs the
outputs by those denominators, which equals one softmax over all regions together.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

LOWEST = torch.finfo(torch.float32).min


class Partial(NamedTuple):
    """Attention over one region."""

    out: Tensor
    """Normalised output `[B, H_kv, R, D]`, float32. R = (query heads a KV head serves) * q."""
    lse: Tensor
    """Log-sum-exp of the region's scores `[B, H_kv, R]`, float32; `LOWEST` where nothing is visible."""


def causal(queries: int, columns: Tensor, seen: int) -> Tensor:
    """Which of the newest `queries` tokens may read the keys at `columns` `[B, n]`: `[B, 1, q, n]`."""
    positions = torch.arange(seen - queries, seen, device=columns.device)
    return columns[:, None, None, :] <= positions[None, None, :, None]


def group_queries(query: Tensor, heads_kv: int) -> Tensor:
    """Rows that share a KV head, side by side: `[B, H_q, q, D]` to `[B, H_kv, R, D]` in float32."""
    batch, heads, length, dim = query.shape
    return query.reshape(batch, heads_kv, heads // heads_kv * length, dim).float()


def partial_attention(
    scores: Tensor, visible: Tensor | None, accumulate: Callable[[Tensor], Tensor]
) -> Partial:
    """Softmax over one region.

    `scores` `[B, H_kv, R, n]` are scaled float32 logits, `visible` (bool, `[B, 1 or H_q, q, n]`; None: all)
    says which query may read which key, and `accumulate` turns weights `[B, H_kv, R, n]` into the
    weighted sum of values `[B, H_kv, R, D]`.
    """
    if visible is not None:
        scores = _mask(scores, visible)
    top = scores.amax(-1, keepdim=True).clamp(min=LOWEST)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True).clamp(min=1.0)
    return Partial(accumulate(weights) / total, (top + total.log()).squeeze(-1))


def _mask(scores: Tensor, visible: Tensor) -> Tensor:
    grid = scores.unflatten(2, (-1, visible.shape[-2]))
    heads = (scores.shape[1], -1) if visible.shape[1] > 1 else (1, 1)
    return grid.masked_fill(~visible.unflatten(1, heads), -torch.inf).flatten(2, 3)


def attend_dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Partial:
    """Attention over plain keys and values `[B, H_kv, n, D]`; `query` `[B, H_kv, R, D]` float32."""
    scores = cap(query @ keys.float().transpose(-1, -2) * scaling, softcap)
    return partial_attention(scores, visible, lambda weights: weights @ values.float())


def attend_plain(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scaling: float
) -> Tensor:
    """SDPA of `query` `[B, H_q, q, D]` over keys and values `[B, H_kv, n, D]`: `[B, q, H_q, D]`.

    `visible` is bool, `[B, 1 or H_q, q, n]`; None: one query sees all, the q queries of a prompt (q = n) are
    causal. These are the calls of transformers' own SDPA, so its results to the bit.
    """
    (batch, heads, queries, dim), heads_kv = query.shape, keys.shape[1]
    groups = heads // heads_kv
    whole = visible is None
    if visible is not None and queries == 1:
        query = query.reshape(batch, heads_kv, groups, dim)
        visible = visible if visible.shape[1] == 1 else visible.reshape(batch, heads_kv, groups, -1)
    elif visible is not None:
        keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    out = scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=visible,
        is_causal=whole and queries > 1,
        scale=scaling,
        enable_gqa=whole and groups > 1,
    )
    return out.reshape(batch, heads, queries, dim).transpose(1, 2).contiguous()


def merge(parts: Sequence[Partial]) -> Partial:
    """One softmax over all regions; zeros where none is visible."""
    return reduce(_join, parts)


def _join(one: Partial, other: Partial) -> Partial:
    share = (other.lse - one.lse).sigmoid().unsqueeze(-1)
    return Partial(one.out.lerp(other.out, share), torch.logaddexp(one.lse, other.lse))


def ungroup(out: Tensor, query: Tensor) -> Tensor:
    """Undo `group_queries` on an output `[B, H_kv, R, D]`: `[B, q, H_q, D]` in the query's dtype."""
    batch, heads, length, _ = query.shape
    return out.reshape(batch, heads, length, -1).transpose(1, 2).to(query.dtype).contiguous()


def cap(scores: Tensor, softcap: float | None) -> Tensor:
    """Squash logits into (-softcap, softcap) as Gemma 2 does; None leaves them."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
