"""KVarN: rotate, balance the variance of tokens and channels, round to 2 to 4 bits.

The worst errors of a 2-bit cache are wrong magnitudes of single tokens. Dividing each tile by scales that
even out its deviations along both tokens and channels removes them; the Hadamard rotation spreads channel
outliers before that. No calibration. arXiv 2606.03458.

Differs: tiles are first divided by their smallest deviation (`normalize`), because the paper's clip of the
log scales otherwise ties the result to the tile's absolute size. Values are rotated when stored and
un-rotated after attention instead of folding the rotation into the weights, so any checkpoint works as it is.
Records of head sizes from 256 on are rounded up to 8 bytes like all others, not to a power of two a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from strop.kernels.tiles import LOG_CLIP, STD_CLIP, TIE
from strop.kv.codec import RoundedKV, RowCodec


def varn(tile: Tensor, n_iter: int = 8, normalize: str = "min_std") -> tuple[Tensor, Tensor]:
    """Scales that even out the standard deviations of a tile's rows and columns (Algorithm 1).

    `tile` `[..., R, C]` float32. Returns row scales `[..., R]` and column scales `[..., C]`: those of the
    last iteration whose imbalance (max / min deviation over columns, plus over rows) was lowest.
    """
    unit = tile.new_ones(tile.shape[:-2])
    if normalize == "min_std":
        unit = least(torch.cat([deviation(tile, -1), deviation(tile, -2)], dim=-1))
    tile = tile / unit[..., None, None]
    log_r, log_c = torch.zeros_like(tile[..., 0]), torch.zeros_like(tile[..., 0, :])
    best, best_r, best_c, now_scaled = imbalance(tile), log_r, log_c, tile
    for _ in range(n_iter):
        log_c = grow(log_c, deviation(now_scaled, -2))
        log_r = grow(log_r, deviation(scaled(tile, log_r, log_c), -1))
        now_scaled = scaled(tile, log_r, log_c)
        now = imbalance(now_scaled)
        better = now <= best * (1 + TIE)
        best = torch.where(better, now, best)
        best_r = torch.where(better[..., None], log_r, best_r)
        best_c = torch.where(better[..., None], log_c, best_c)
    return best_r.exp(), best_c.exp() * unit[..., None]


@dataclass(frozen=True)
class VarN:
    """`varn` with its settings."""

    n_iter: int = 8
    normalize: str = "min_std"

    def __call__(self, tile: Tensor) -> tuple[Tensor, Tensor]:
        return varn(tile, self.n_iter, self.normalize)


def deviation(tile: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation along `dim`; several times faster than `Tensor.std` on a CPU."""
    centered = tile - tile.mean(dim, keepdim=True)
    return (centered.square().sum(dim) / (tile.shape[dim] - 1)).sqrt()


def scaled(tile: Tensor, log_r: Tensor, log_c: Tensor) -> Tensor:
    """The tile divided by its current scales."""
    return tile / log_c.exp().unsqueeze(-2) / log_r.exp().unsqueeze(-1)


def grow(log_scale: Tensor, std: Tensor) -> Tensor:
    """Fold the current deviations into the log scales."""
    return (log_scale + std.clamp(*STD_CLIP).log()).clamp(*LOG_CLIP)


def imbalance(tile: Tensor) -> Tensor:
    """Max / min deviation over columns plus over rows, `[...]`; 1 + 1 is perfect balance."""
    return sum(std.amax(-1) / least(std) for std in (deviation(tile, -2), deviation(tile, -1)))


def least(std: Tensor) -> Tensor:
    """The smallest of deviations `[..., n]`, zero tokens and constant channels left out; 1 if none is."""
    counts = std > 1e-6 * std.amax(-1, keepdim=True)
    smallest = torch.where(counts, std, torch.inf).amin(-1)
    return torch.where(smallest.isfinite(), smallest, 1.0)


@dataclass(frozen=True, kw_only=True)
class KVarN(RoundedKV):
    """KV cache in packed, variance-normalised tiles. The paper's presets: k4v4, k4v2 (default), k2v2."""

    n_iter: int = 8
    """Balancing iterations."""
    normalize: str = "min_std"
    """Divide tiles by their smallest deviation first; "none" is the paper's behaviour."""

    def __post_init__(self, bits: int | None) -> None:
        super().__post_init__(bits)
        if self.n_iter < 1:
            raise ValueError(f"n_iter must be at least 1, got {self.n_iter}")
        if self.normalize not in ("min_std", "none"):
            raise ValueError(f'normalize must be "min_std" or "none", got {self.normalize!r}')

    def codec(self) -> RowCodec:
        balance = VarN(self.n_iter, self.normalize)
        return RowCodec(self.bits_k, self.bits_v, self.group, True, balance, self.aux_dtype)
