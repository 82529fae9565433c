"""Pearson correlations of paired features over a stream of tokens, in one pass and constant memory.

Tokens count into folds by their sequence, so that intervals over sequences, and splits that share no text,
come from the same sums.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from strop.kernels.moments import SUMS, kernels

FLOOR = 1e-12
"""Least variance, relative to the mean square: less is rounding."""


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens of some folds; arrays `[..., m]` float64, `tokens` `[...]`."""

    tokens: np.ndarray
    x: np.ndarray
    y: np.ndarray
    xx: np.ndarray
    yy: np.ndarray
    xy: np.ndarray
    fires_x: np.ndarray
    fires_y: np.ndarray
    both: np.ndarray

    def correlation(self) -> np.ndarray:
        """Pearson correlation over all tokens; 0 where either is the same at all of them."""
        return np.nan_to_num(self._pearson(self.tokens[..., None]))

    def correlation_where_firing(self) -> np.ndarray:
        """Pearson correlation over tokens where either fires; tokens where both are 0 do not inflate it.

        Not a number where one of them is the same at all of these tokens.
        """
        return self._pearson(self.fires_x + self.fires_y - self.both)

    def f1(self) -> np.ndarray:
        """Agreement of the sets of tokens where each fires; 1 where neither ever does."""
        fired = self.fires_x + self.fires_y
        return np.where(fired > 0, 2 * self.both / np.maximum(fired, 1), 1.0)

    def varies(self) -> np.ndarray:
        """Where x or y is not the same at all tokens."""
        n = self.tokens[..., None]
        spreads = ((n * self.xx - self.x**2, self.xx), (n * self.yy - self.y**2, self.yy))
        one, other = (spread > FLOOR * n * squares for spread, squares in spreads)
        return one | other

    def rate(self) -> np.ndarray:
        """Share of tokens where x fires."""
        return self.fires_x / self.tokens[..., None]

    def mean_firing(self) -> np.ndarray:
        """Mean of x where it fires; 0 where it never does."""
        return self.x / np.maximum(self.fires_x, 1)

    def _pearson(self, n: np.ndarray) -> np.ndarray:
        spread_x, spread_y = n * self.xx - self.x**2, n * self.yy - self.y**2
        varies = (spread_x > FLOOR * n * self.xx) & (spread_y > FLOOR * n * self.yy)
        below = np.sqrt(np.where(varies, spread_x * spread_y, 1))
        return np.where(varies, (n * self.xy - self.x * self.y) / below, np.nan)


class StreamingPearson:
    """Sums of m paired features over a stream of tokens, in `folds` parts."""

    def __init__(self, m: int, folds: int = 1, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.sums = torch.zeros(folds, len(SUMS), m, dtype=torch.float64, device=device)
        self.peaks = torch.zeros(folds, 2, m, device=device)
        self.places = torch.full((folds, 2, m), -1, dtype=torch.int64, device=device)
        """Largest x and y of each fold, and the numbers of the tokens where they stood; -1 for none."""
        self.tokens = torch.zeros(folds, dtype=torch.float64)
        self.seen = 0

    def update(self, x: Tensor, y: Tensor, folds: Tensor | None = None) -> None:
        """Add tokens: `x` and `y` `[T, m]` float32, none below 0; `folds` `[T]` says where each counts."""
        if folds is None:
            folds = torch.zeros(len(x), dtype=torch.int64)
        self.tokens += torch.bincount(folds.cpu(), minlength=len(self.tokens))
        kernels(self.device.type).accumulate(
            x.contiguous(),
            y.contiguous(),
            folds.to(self.device),
            self.seen,
            self.sums,
            self.peaks,
            self.places,
        )
        self.seen += len(x)

    def of(self, weights: np.ndarray | None = None) -> Sums:
        """The sums of all folds, or of weighted ones: `weights` `[..., folds]` gives sums `[..., m]`."""
        held, tokens = self.sums.cpu().numpy(), self.tokens.numpy()
        if weights is None:
            weights = np.ones(len(tokens))
        total = np.tensordot(weights, held, axes=1)
        return Sums(weights @ tokens, *np.moveaxis(total, -2, 0))
