"""`topk` for a CPU. Floats above 0 are ordered as their bits are, so a row is searched as integers, and what
is below 0 is below them as well.
"""

import numpy as np
from numba import njit
from torch import Tensor, int32

LINES = 16
"""Values of a column, of which the largest is looked at first."""


def keep_largest(values: Tensor, k: int) -> Tensor:
    """As `topk.keep_largest`."""
    _keep_largest(values.view(int32).numpy(), k)
    return values


@njit(nogil=True, cache=True)
def _count(bits: np.ndarray, least: np.int32) -> int:
    found = np.int32(0)
    for index in range(len(bits)):
        found += np.int32(bits[index] >= least)
    return found


@njit(nogil=True, cache=True)
def _largest(bits: np.ndarray, k: int) -> np.int32:
    """The k-th largest, found bit by bit; 0 where fewer are above 0."""
    least = np.int32(0)
    for place in range(30, -1, -1):
        more = np.int32(least | (np.int32(1) << np.int32(place)))
        if _count(bits, more) >= k:
            least = more
    return least


@njit(nogil=True, cache=True)
def _maxima(row: np.ndarray, into: np.ndarray) -> None:
    """The largest of each column of a row that is laid out in lines, and 0 where none is above 0."""
    into[:] = 0
    for first in range(0, len(row), len(into)):
        for index in range(min(len(into), len(row) - first)):
            into[index] = max(row[first + index], into[index])


@njit(nogil=True, cache=True)
def _candidates(row: np.ndarray, maxima: np.ndarray, bound: np.int32, into: np.ndarray) -> int:
    """Write what is `bound` at least; returns how many."""
    found = 0
    for column in range(len(maxima)):
        if maxima[column] >= bound:
            for index in range(column, len(row), len(maxima)):
                into[found] = row[index]
                found += row[index] >= bound
    return found


@njit(nogil=True, cache=True)
def _clear(row: np.ndarray, least: np.int32) -> int:
    """Make 0 what is below `least` or not above 0; returns how many stay."""
    kept = np.int32(0)
    for index in range(len(row)):
        stays = (row[index] >= least) & (row[index] > 0)
        row[index] = row[index] if stays else np.int32(0)
        kept += np.int32(stays)
    return kept


@njit(nogil=True, cache=True)
def _keep_largest(values: np.ndarray, k: int) -> None:
    maxima = np.empty(max(values.shape[1] // LINES, 1), np.int32)
    candidates = np.empty(values.shape[1] + 1, np.int32)
    for token in range(values.shape[0]):
        row = values[token]
        _maxima(row, maxima)
        found = _candidates(row, maxima, _largest(maxima, k), candidates)
        least = _largest(candidates[:found], k)
        more = _clear(row, least) - k
        for index in range(len(row)):
            if more <= 0:
                break
            if row[index] == least:
                row[index] = 0
                more -= 1
