"""Max-min fair rates of flows over shared links: no flow can gain without one that has no more losing.

Rates rise together from 0. A flow stops at the limit of its route, and all flows on a link when it is full.
Routes are rows of `paths` `[R, P]` int32, the numbers of their links, then -1, and of `limits` `[R]`, the
most that one flow gets; `flows` `[F]` int64 are the routes of flows, and `capacity` `[L]` is that of the
links. Rates, limits and capacities are bytes a second, above 0.
"""

from functools import lru_cache
from importlib import import_module
from types import ModuleType

import numpy as np

SLACK = 1e-12
"""Part of its bytes to go that rounding may leave to a flow that has ended."""


@lru_cache(maxsize=1)
def kernels() -> ModuleType:
    """The module whose functions serve: numba's, which is imported when first asked for."""
    return import_module("strop.kernels.maxmin_numba")


def fair(
    paths: np.ndarray, limits: np.ndarray, flows: np.ndarray, capacity: np.ndarray, rates: np.ndarray
) -> None:
    """Write the rates `[F]` of flows."""
    links, limit = paths[flows], limits[flows]
    crosses = np.zeros((len(flows), len(capacity) + 1))
    crosses[np.arange(len(flows))[:, None], links] = 1
    crosses = crosses[:, :-1]
    room, rising = capacity.astype(float), np.ones(len(flows), bool)
    while rising.any():
        load = crosses[rising].sum(0)
        share = np.divide(room, load, out=np.full(len(room), np.inf), where=load > 0)
        level = share.min(initial=np.inf)
        stops = rising & (limit <= level)
        if not stops.any():
            stops = rising & crosses[:, share == level].any(1)
        rates[stops] = np.minimum(limit[stops], level)
        room -= rates[stops] @ crosses[stops]
        rising &= ~stops


def advance(
    paths: np.ndarray,
    limits: np.ndarray,
    capacity: np.ndarray,
    flows: np.ndarray,
    left: np.ndarray,
    rates: np.ndarray,
    ended: np.ndarray,
    count: int,
    seconds: float,
) -> tuple[int, float, float]:
    """Let the first `count` flows run on at their rates, drop those that end, and share the links anew.

    `left` `[F]` are bytes to go. What stays moves to the front in the same order, and `ended` `[F]` int64
    gets the places that the others had. Returns how many stay, the seconds until the next ends, and the bytes
    moved.
    """
    moved = rates[:count] * seconds
    done = left[:count] - moved <= left[:count] * SLACK
    left[:count] -= moved
    gone, stay = np.flatnonzero(done), np.flatnonzero(~done)
    ended[: len(gone)] = gone
    for column in (flows, left, rates):
        column[: len(stay)] = column[stay]
    now = slice(0, len(stay))
    fair(paths, limits, flows[now], capacity, rates[now])
    return len(stay), float((left[now] / rates[now]).min(initial=np.inf)), float(moved.sum())
