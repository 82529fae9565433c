"""Which blocks go to which device of a pipeline: the dynamic programme of E2LLM (arXiv 2606.03770).

DP(i, k, m) is the least slowest-stage time when blocks 0..i are on the first k devices, m telling whether the
k-th is the master, which also has the head. As printed, the recurrence takes a minimum where a bottleneck
needs a maximum, gives the device before the current one's m, and may lose block 0 on the way back; here the
maximum is taken, each device has its own m, and the first device gets all that is left.
"""

from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """The best split of each variant."""

    slowest: np.ndarray
    """Seconds of the slowest stage `[B]`; infinite where no split fits."""
    master: np.ndarray
    """Which device has the head `[B]`."""
    first: np.ndarray
    """The first block of each device `[B, K]`."""


def partition(plain: np.ndarray, master: np.ndarray, transfer: np.ndarray) -> Split:
    """Split N blocks over K devices in their order, for B variants of the costs at once.

    `plain[k, b, j, i]` is the time of blocks j..i on device k, `master` the same with the head; both infinite
    where they do not fit or where j > i. `transfer[k, b]` is the time from device k - 1 to device k. Every
    device gets at least one block; O(K^2 N^2) for all masters.
    """
    devices, _, blocks, _ = plain.shape
    masters = np.arange(devices)
    best = np.where((masters == 0)[:, None, None], master[0, :, 0], plain[0, :, 0])
    starts = []
    for k in range(1, devices):
        reached = np.maximum(best[:, :, :-1], transfer[k][None, :, None])
        total = np.maximum(reached[..., None], plain[k, None, :, 1:])
        total[k] = np.maximum(reached[k, ..., None], master[k, :, 1:])
        at = total.argmin(-2)
        best = np.take_along_axis(total, at[..., None, :], -2)[..., 0, :]
        starts.append(at + 1)
    return _back(best[..., blocks - 1], starts)


def _back(slowest: np.ndarray, starts: list[np.ndarray]) -> Split:
    """The best master `[M, B]` of each variant, and from its last block back to the first."""
    chosen = slowest.argmin(0)
    variants = np.arange(len(chosen))
    first = np.zeros((len(chosen), len(starts) + 1), dtype=int)
    last = np.full(len(chosen), -1)
    for k in range(len(starts), 0, -1):
        first[:, k] = starts[k - 1][chosen, variants, last]
        last = np.maximum(first[:, k] - 1, 0)
    return Split(slowest[chosen, variants], chosen, first)
