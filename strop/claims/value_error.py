"""How well a cheap statistic of a token's value tells what rounding the value will cost.

Values are rounded to nearest between the extremes of each group of a token's channels, as HQQ does before it
refines (arXiv 2606.03928, section 3).
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from strop.claims.base import Row

POINTS = ((2, 32), (4, 64))
"""Bits and group of each rounding."""
SPREADS = {
    "Range": lambda values: values.amax(-1) - values.amin(-1),
    "L2": lambda values: values.norm(dim=-1),
    "Variance": lambda values: values.var(-1),
}
"""Statistics of values `[..., D]`."""


def rounding_error(values: Tensor, bits: int, group: int) -> Tensor:
    """Norm of each token's error, `[..., D]` to `[...]`."""
    parts = values.unflatten(-1, (-1, group))
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(values.dtype).tiny)
    return (((parts - low) / step).round() * step + low - parts).flatten(-2).norm(dim=-1)


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's, over the last dimension."""
    a, b = (x - x.mean(-1, keepdim=True) for x in (one, other))
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def correlation_study(name: str, cache: Cache, repetitions: int) -> list[Row]:
    """Correlation over the tokens of each layer and KV head, then the mean; a repetition is some texts.

    `cache` holds the undamaged values of texts, those of a repetition side by side. `pooled` is the
    correlation over all layers and heads at once.
    """
    values = torch.stack([layer.values.float() for layer in cache.layers], 1)
    groups = values.flatten(1, 2).unflatten(0, (repetitions, -1))  # [S, b, layers * H_kv, T, D]
    rows = []
    for bits, group in POINTS:
        error = rounding_error(groups, bits, group)
        for spread, measure in SPREADS.items():
            found = measure(groups)
            within = correlation(found, error).flatten(1).mean(1).tolist()
            pooled = correlation(found.flatten(1), error.flatten(1)).tolist()
            place = {"study": "value error", "model": name, "bits": bits, "group": group, "spread": spread}
            rows.append({**place, "correlation": within, "pooled": pooled})
    return rows
