"""What codecs do to single tiles: errors per token, and how much of the worst ones is a wrong magnitude.

A token's squared error splits into (|K| - |K'|)^2, its magnitude, and 2 |K| |K'| (1 - cos), its direction
(arXiv 2606.03458, section 3.1). Tiles are generated, with one known trouble each, or captured from a model.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from strop.kv.tile_store import TileCodec

TOP = 0.05
"""Share of tokens that count as the worst."""
SIGMA = 0.7
"""Standard deviation of the logarithm of token scales."""
OUTLIERS, FACTOR = 1 / 16, 8.0
"""Share of channels that stick out, and by how much."""


def gaussian(count: int, group: int, dim: int, draw: torch.Generator) -> Tensor:
    """Tiles `[n, G, D]` without any structure."""
    return torch.randn(count, group, dim, generator=draw)


def channel_outliers(count: int, group: int, dim: int, draw: torch.Generator) -> Tensor:
    """Gaussian tiles with a few channels, others in each tile, that are larger for all tokens."""
    rank = torch.rand(count, 1, dim, generator=draw).argsort(-1).argsort(-1)
    return gaussian(count, group, dim, draw) * torch.where(rank < OUTLIERS * dim, FACTOR, 1.0)


def token_scales(count: int, group: int, dim: int, draw: torch.Generator) -> Tensor:
    """Gaussian tiles whose tokens differ by log-normal factors."""
    return gaussian(count, group, dim, draw) * _scales(count, group, draw)


def both(count: int, group: int, dim: int, draw: torch.Generator) -> Tensor:
    """Channel outliers and token scales together."""
    return channel_outliers(count, group, dim, draw) * _scales(count, group, draw)


def _scales(count: int, group: int, draw: torch.Generator) -> Tensor:
    return (SIGMA * torch.randn(count, group, 1, generator=draw)).exp()


Maker = Callable[[int, int, int, torch.Generator], Tensor]
GENERATED: dict[str, tuple[str, Maker]] = {
    "gaussian": ("keys", gaussian),
    "channel outliers": ("keys", channel_outliers),
    "token scales": ("keys", token_scales),
    "channel outliers + token scales": ("keys", both),
    "values, channel outliers": ("values", channel_outliers),
}
"""Name of each kind of generated tile, the part that it is coded as, and its maker."""


def generate(kind: str, count: int, group: int, dim: int, seed: int) -> Tensor:
    """`count` tiles `[n, G, D]` of a kind, a function of the seed."""
    return GENERATED[kind][1](count, group, dim, torch.Generator().manual_seed(seed))


def capture(cache: Cache, part: str, group: int, sinks: int) -> Tensor:
    """Tiles that a model's cache holds, `[B, n, G, D]`: all layers and heads of each text, without its sinks.

    `part` is "keys" or "values".
    """
    layers = []
    for layer in cache.layers:
        held = getattr(layer, part)[:, :, sinks:].float()
        full = held[:, :, : held.shape[2] // group * group]
        layers.append(full.unflatten(2, (-1, group)).flatten(1, 2))
    return torch.cat(layers, dim=1)


def damage(codec: TileCodec, part: str, tiles: Tensor) -> dict[str, float]:
    """Errors of tiles `[n, G, D]` coded as `part`.

    `token_relative` is the mean over tokens of |x - x'|^2 / |x|^2, `nmse` the ratio of their sums,
    `magnitude_share` the part that magnitude has in the `TOP` largest errors, and `magnitude_share_relative`
    the same where errors are ranked relative to their token.
    """
    decoded = codec.decode(codec.encode(tiles, tiles), tiles.shape[-1])[part == "values"]
    error = (tiles - decoded).square().sum(-1).flatten()
    norm = tiles.norm(dim=-1).flatten()
    power = norm.square().clamp(min=1e-30)
    magnitude = (norm - decoded.norm(dim=-1).flatten()).square()
    return {
        "token_relative": float((error / power).mean()),
        "nmse": float(error.sum() / power.sum()),
        "magnitude_share": _worst_share(magnitude, error, error),
        "magnitude_share_relative": _worst_share(magnitude, error, error / power),
    }


def _worst_share(magnitude: Tensor, error: Tensor, rank: Tensor) -> float:
    worst = rank.topk(max(round(TOP * len(rank)), 1)).indices
    return float(magnitude[worst].sum() / error[worst].sum().clamp(min=1e-30))
