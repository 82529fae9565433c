"""Attention over regions that are stored differently, joined by their log-sum-exp.

Each region yields its own normalised output and the log of its softmax denominator; `merge` weighs the
outputs by those denominators, which equals one softmax over all regions together.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over one region."""

    out: Tensor
    """Normalised output `[B, H_kv, R, D]`, float32. R = (query heads a KV head serves) * q."""
    lse: Tensor
    """Log-sum-exp of the region's scores `[B, H_kv, R]`, float32; -inf where nothing is visible."""


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
    lse = scores.logsumexp(-1)
    weights = (scores - _finite(lse).unsqueeze(-1)).exp()
    return Partial(accumulate(weights), lse)


def _mask(scores: Tensor, visible: Tensor) -> Tensor:
    batch, heads_kv, rows, keys = scores.shape
    length = visible.shape[-2]
    grid = scores.view(batch, heads_kv, rows // length, length, keys)
    shape = (batch, heads_kv, -1) if visible.shape[1] > 1 else (batch, 1, 1)
    return grid.masked_fill(~visible.view(*shape, length, keys), -torch.inf).view_as(scores)


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


def merge(parts: Sequence[Partial]) -> Tensor:
    """One softmax over all regions: outputs `[B, H_kv, R, D]`; zeros where no region is visible."""
    if len(parts) == 1:
        return parts[0].out
    lse = torch.stack([part.lse for part in parts])
    weights = (lse - _finite(lse.logsumexp(0))).exp().unsqueeze(-1)
    return (weights * torch.stack([part.out for part in parts])).sum(0)


def _finite(lse: Tensor) -> Tensor:
    """Zero for an empty region, so that exp(-inf - lse) is 0 and not NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def ungroup(out: Tensor, query: Tensor) -> Tensor:
    """Undo `group_queries` on an output `[B, H_kv, R, D]`: `[B, q, H_q, D]` in the query's dtype."""
    batch, heads, length, _ = query.shape
    return out.reshape(batch, heads, length, -1).transpose(1, 2).to(query.dtype).contiguous()


def cap(scores: Tensor, softcap: float | None) -> Tensor:
    """Squash logits into (-softcap, softcap) as Gemma 2 does; None leaves them."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
