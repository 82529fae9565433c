"""`maxmin` for a CPU: only links that carry flows are looked at, and a whole event is one call."""

import numpy as np
from numba import njit

from strop.kernels.maxmin import SLACK


@njit(nogil=True, cache=True)
def fair(
    paths: np.ndarray, limits: np.ndarray, flows: np.ndarray, capacity: np.ndarray, rates: np.ndarray
) -> None:
    """As `maxmin.fair`."""
    load = np.zeros(len(capacity), np.int64)
    room, share = np.empty(len(capacity)), np.empty(len(capacity))
    used, rising = np.empty(len(capacity), np.int64), np.empty(len(flows), np.int64)
    busy = 0
    for flow in range(len(flows)):
        rising[flow] = flow
        for link in paths[flows[flow]]:
            if link < 0:
                continue
            if load[link] == 0:
                used[busy], room[link] = link, capacity[link]
                busy += 1
            load[link] += 1
    count = len(flows)
    while count > 0:
        level, still = np.inf, 0
        for index in range(busy):
            link = used[index]
            if load[link] > 0:
                used[still] = link
                still += 1
                share[link] = room[link] / load[link]
                level = min(level, share[link])
        busy = still
        staying = _stop(paths, limits, flows, rates, rising, count, load, room, share, level, True)
        if staying == count:
            staying = _stop(paths, limits, flows, rates, rising, count, load, room, share, level, False)
        count = staying


@njit(nogil=True, cache=True)
def _stop(paths, limits, flows, rates, rising, count, load, room, share, level, at_limit):
    """Stop what has reached its limit, or what crosses a link that is full; returns how many rise on."""
    staying = 0
    for index in range(count):
        flow = rising[index]
        route = flows[flow]
        stops = limits[route] <= level
        if not at_limit:
            for link in paths[route]:
                stops |= link >= 0 and share[link] <= level
        if not stops:
            rising[staying] = flow
            staying += 1
            continue
        rates[flow] = min(limits[route], level)
        for link in paths[route]:
            if link >= 0:
                load[link] -= 1
                room[link] -= rates[flow]
    return staying


@njit(nogil=True, cache=True)
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
    """As `maxmin.advance`."""
    moved, stay = 0.0, 0
    for flow in range(count):
        sent = rates[flow] * seconds
        moved += sent
        rest = left[flow] - sent
        if rest <= left[flow] * SLACK:
            ended[flow - stay] = flow
        else:
            flows[stay], left[stay], rates[stay] = flows[flow], rest, rates[flow]
            stay += 1
    fair(paths, limits, flows[:stay], capacity, rates[:stay])
    soonest = np.inf
    for flow in range(stay):
        soonest = min(soonest, left[flow] / rates[flow])
    return stay, soonest, moved
