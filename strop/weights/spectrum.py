"""How heavy the tail of a matrix's spectrum is, from the weights alone: FARMS and the Hill estimator.

A matrix is cut into square tiles and the eigenvalues of all are pooled, so that the exponent does not depend
on the matrix's shape (FARMS, arXiv 2506.06280); AlphaQ (arXiv 2606.04980) reads sensitivity from it. Left
out: other starts of the tail, overlapping tiles, and whole matrices in the place of tiles that are too large,
as the two give exponents on different scales.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from strop.core.errors import StropError

MOST_TILES = 256
LEAST_TAIL = 10
RESOLVED = {torch.float32: 1e-4, torch.float64: 1e-11}
"""Eigenvalues of a Gram matrix below this share of the largest drown in rounding."""
FARTHEST = 600.0
"""Most that the logarithm of a sensitivity is, so that sums of costs stay finite numbers."""
FLAT = 1e-4
"""A mean log ratio below this is rounding: the tail has no slope."""


class AlphaStat(NamedTuple):
    """The spectral exponent of one matrix."""

    alpha: float
    """Small where the tail is heavy; about 6.4 for independent Gaussian weights at tiles of 128."""
    se: float
    """Standard error of `alpha`, from the differences between tiles."""
    n: int
    """Pooled eigenvalues."""


class Signal(NamedTuple):
    """Whether matrices differ by more than one estimate errs."""

    spread: float
    """Standard deviation of alpha over matrices."""
    se: float
    """Typical standard error of one alpha: the root mean square."""
    present: bool
    said: str
    """One sentence with the numbers."""


@torch.no_grad()
def spectral_alpha(weight: Tensor, tile: int = 128, k_frac: float = 0.1, seed: int = 0) -> AlphaStat:
    """The FARMS exponent of `weight` `[O, I]`, on the device of `weight`.

    Whole tiles `[tile, tile]` are taken without overlap, at most 256 of them, drawn by `seed` alone; edges
    that fill no tile are not read. Alphas compare only at equal `tile` and `k_frac`. Raises StropError where
    there is no tail to fit: fewer than two tiles, NaN, zeros, low rank, or equal eigenvalues.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating-point matrix, got {weight.dtype} {tuple(weight.shape)}")
    if tile < 2 or not 0 < k_frac < 1:
        raise ValueError(f"tile must be at least 2 and k_frac within (0, 1), got {tile} and {k_frac}")
    tiles = _tiles(weight, tile, seed)
    spectra = _spectra(tiles, torch.float32)
    tail = np.sort(spectra, axis=None)[::-1]
    if tail[_tail_length(tail.size, k_frac)] < RESOLVED[torch.float32] * tail[0]:
        spectra = _spectra(tiles, torch.float64)
    return AlphaStat(hill(spectra, k_frac), _standard_error(spectra, k_frac), spectra.size)


def hill(eigenvalues: np.ndarray, k_frac: float = 0.1) -> float:
    """`1 + k / sum(ln(lambda_i / lambda_{k+1}))` over the k largest of all `eigenvalues`, of any shape.

    k is `k_frac` of them, at least 10 if there are more. Raises StropError for low rank or equal eigenvalues.
    """
    ordered = np.sort(eigenvalues, axis=None)[::-1]
    k = _tail_length(ordered.size, k_frac)
    if not ordered[k] > RESOLVED[torch.float64] * ordered[0]:
        raise StropError(
            f"no more than {k} of {ordered.size} eigenvalues differ from zero, so there is no tail to fit: "
            "leave this matrix of low rank out"
        )
    slope = float(np.log(ordered[:k] / ordered[k]).mean())
    if slope < FLAT:
        raise StropError(
            f"the {k + 1} largest eigenvalues are equal, so there is no tail to fit: leave this matrix out"
        )
    return 1 + 1 / slope


def tile_for(shapes: Sequence[tuple[int, int]], least: int = 8) -> int:
    """The one tile size for matrices of `shapes`: 128, or the first power of 2 to give each `least` tiles.

    Raises StropError, naming the smallest shape, if tiles of 16 are too few.
    """
    if not shapes:
        raise ValueError("tile_for needs at least one shape")
    for tile in (128, 64, 32, 16):
        if all((rows // tile) * (columns // tile) >= least for rows, columns in shapes):
            return tile
    rows, columns = min(shapes, key=lambda shape: (shape[0] // 16) * (shape[1] // 16))
    raise StropError(
        f"a matrix of {rows} x {columns} holds fewer than {least} tiles of 16 x 16, too few for a spectrum: "
        "leave it out"
    )


def signal(stats: Sequence[AlphaStat]) -> Signal:
    """Compare the spread of alpha between matrices with twice its standard error within one.

    Matrices of pure noise spread by about one standard error, whatever their shapes. Among few the spread
    itself is uncertain: noise passes for a signal in 5 % of cases with 2 matrices, and below 1 % from 4 on.
    """
    if not stats:
        raise ValueError("signal needs at least one matrix")
    alphas, errors = np.array([stat[:2] for stat in stats]).T
    spread = float(alphas.std(ddof=1)) if len(stats) > 1 else 0.0
    se = math.sqrt(np.square(errors).mean())
    present = spread > 2 * se
    said = (
        f"{'Spectral' if present else 'No spectral'} signal: over {len(stats)} matrices alpha has a standard "
        f"deviation of {spread:.3g}, {'more' if present else 'not more'} than twice the standard error of "
        f"one, {se:.3g}"
    )
    return Signal(spread, se, present, said)


def auto_gamma(alphas: Sequence[float] | np.ndarray, ratio: float = 8.0) -> float:
    """`ln(ratio) / ln(alpha_95 / alpha_05)`, where percentiles 5 and 95 of the sensitivity differ by `ratio`.

    Raises StropError if these percentiles of `alphas` `[L]` are equal.
    """
    if ratio <= 1:
        raise ValueError(f"ratio must be above 1, got {ratio}")
    low, high = np.percentile(alphas, (5, 95))
    if not low < high:
        raise StropError(
            f"alpha is {low:.4g} for nearly all matrices, so no gamma can tell them apart: use gamma=0"
        )
    return math.log(ratio) / math.log(high / low)


def sensitivity(alphas: Sequence[float] | np.ndarray, gamma: float) -> np.ndarray:
    """`(median / alpha) ** gamma` `[L]`: above 1 where the tail is heavier than the median's.

    Within `exp(-600)` and `exp(600)`, so that any gamma gives finite costs.
    """
    alphas = np.asarray(alphas, dtype=float)
    most = FARTHEST / max(gamma, 1.0)
    return np.exp(gamma * np.log(np.median(alphas) / alphas).clip(-most, most))


def _tiles(weight: Tensor, tile: int, seed: int) -> Tensor:
    """Tiles `[T, tile, tile]` in float32 or wider, scaled to a largest weight of 1; T is at most 256."""
    rows, columns = weight.shape[0] // tile, weight.shape[1] // tile
    shape = f"{weight.shape[0]} x {weight.shape[1]}"
    if rows * columns < 2:
        raise StropError(
            f"a matrix of {shape} holds fewer than two tiles of {tile} x {tile}: use a smaller tile, "
            "the same for all matrices"
        )
    low, high = (float(edge) for edge in weight.aminmax())
    peak = max(-low, high)
    if not math.isfinite(peak):
        raise StropError(f"a matrix of {shape} holds NaN or infinity: repair the checkpoint")
    if peak == 0:
        raise StropError(f"a matrix of {shape} is all zeros and has no spectrum: leave it out")
    chosen = np.arange(rows * columns)
    if chosen.size > MOST_TILES:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, MOST_TILES, replace=False))
    grid = weight.unfold(0, tile, tile).unfold(1, tile, tile)
    row, column = (torch.from_numpy(index).to(weight.device) for index in np.divmod(chosen, columns))
    tiles = grid[row, column]
    return tiles.to(torch.promote_types(weight.dtype, torch.float32)) / peak


def _spectra(tiles: Tensor, precision: torch.dtype) -> np.ndarray:
    """Squared singular values `[T, tile]`, as the eigenvalues of each tile's Gram matrix.

    This takes 0.6 of the time of singular values, and the largest tenth is as exact.
    """
    tiles = tiles.to(precision)
    with _one_thread():
        return torch.linalg.eigvalsh(tiles @ tiles.mT).double().cpu().numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK on small matrices is slower with several threads. The setting is the calling thread's own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tail_length(n: int, k_frac: float) -> int:
    return min(max(LEAST_TAIL, int(k_frac * n)), n - 1)


def _standard_error(spectra: np.ndarray, k_frac: float) -> float:
    """Standard error of `hill` over `spectra` `[T, tile]` by the delta method, with tiles as the sample.

    A tile's influence is the sum of its logs beyond the threshold, less their count times the slope of the
    ordered logs there, which is read from the tail's last quarter and as many eigenvalues below it. Agrees
    with the bootstrap over tiles times `sqrt(T / (T - 1))` and costs nothing.
    """
    ordered = np.sort(spectra, axis=None)[::-1]
    k = _tail_length(ordered.size, k_frac)
    threshold = ordered[k]
    width = max(2, k // 4)
    first, last = max(0, k - width), min(ordered.size - 1, k + width)
    below = max(ordered[last], RESOLVED[torch.float64] * ordered[0])
    slope = k * math.log(ordered[first] / below) / (last - first)
    beyond = spectra > threshold
    logs = np.log(np.where(beyond, spectra, threshold) / threshold)
    influence = (logs - slope * beyond).sum(1) / k
    tiles = len(spectra)
    variance = tiles * influence.var(ddof=1)
    return math.sqrt(variance) / float(logs.sum() / k) ** 2
