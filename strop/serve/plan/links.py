"""In which order a pipeline visits devices where links differ: its slowest link is as fast as can be."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

EXACT = 9
"""Devices up to which the order is the best one; beyond, each next device is the nearest."""


def slowest_link_first(group: Sequence[int], cost: Mapping[tuple[int, int], float]) -> list[int]:
    """An order of `group` whose largest `cost` between neighbours is least."""
    if len(group) > EXACT:
        return min((_nearest(start, group, cost) for start in group), key=lambda path: _largest(path, cost))
    best = {(1 << k, k): (0.0, [device]) for k, device in enumerate(group)}
    for _ in group[1:]:
        longer: dict[tuple[int, int], tuple[float, list[int]]] = {}
        for (seen, _), (worst, path) in best.items():
            for k, device in enumerate(group):
                if seen >> k & 1:
                    continue
                now = max(worst, cost[path[-1], device])
                key = seen | 1 << k, k
                if now < longer.get(key, (math.inf, []))[0]:
                    longer[key] = now, [*path, device]
        best = longer
    return min(best.values())[1]


def _nearest(start: int, group: Sequence[int], cost: Mapping[tuple[int, int], float]) -> list[int]:
    path, left = [start], set(group) - {start}
    while left:
        path.append(min(sorted(left), key=lambda device: cost[path[-1], device]))
        left.remove(path[-1])
    return path


def _largest(path: Sequence[int], cost: Mapping[tuple[int, int], float]) -> float:
    return max(cost[pair] for pair in pairwise(path))
