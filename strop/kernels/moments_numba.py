"""The sums of `moments` for a CPU: one reading of both activations, nothing in between stored."""

import numpy as np
from numba import njit
from torch import Tensor


def accumulate(
    x: Tensor, y: Tensor, folds: Tensor, first: int, sums: Tensor, peaks: Tensor, places: Tensor
) -> None:
    """As `moments.accumulate`."""
    _accumulate(x.numpy(), y.numpy(), folds.numpy(), first, sums.numpy(), peaks.numpy(), places.numpy())


@njit(nogil=True, cache=True)
def _accumulate(
    x: np.ndarray,
    y: np.ndarray,
    folds: np.ndarray,
    first: int,
    sums: np.ndarray,
    peaks: np.ndarray,
    places: np.ndarray,
) -> None:
    for token in range(x.shape[0]):
        fold = folds[token]
        into, peak, place = sums[fold], peaks[fold], places[fold]
        for feature in range(x.shape[1]):
            one, other = x[token, feature], y[token, feature]
            if one == 0 and other == 0:
                continue
            a, b = np.float64(one), np.float64(other)
            into[0, feature] += a
            into[1, feature] += b
            into[2, feature] += a * a
            into[3, feature] += b * b
            into[4, feature] += a * b
            into[5, feature] += one > 0
            into[6, feature] += other > 0
            into[7, feature] += one > 0 and other > 0
            if one > peak[0, feature]:
                peak[0, feature] = one
                place[0, feature] = first + token
            if other > peak[1, feature]:
                peak[1, feature] = other
                place[1, feature] = first + token
