"""Will a network-aware choice of decode instances help? What it can gain, before anything is simulated.

The model: a request's KV is `nbytes * (1 - hit)`; endpoints lie on tiers as seen from where it was computed;
each has room with probability `room`, independently. A policy that is blind to the network takes any endpoint
with room; NetKV (arXiv 2606.03910) takes the nearest. Both wait alike and hit alike, which flatters NetKV: it
crowds near endpoints and gives up hits that lie far. Left out: latencies, and what transfers take from one
another. So the gain holds about while links are not full; where they fill, turning away from far endpoints
empties them too, and the gain is larger.

The rest are the paper's statements in closed form: from which length near beats warm (its proposition 1), and
when an old measurement cannot mislead. The conditions are derived from the cost function.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite

import numpy as np

from strop.core.errors import StropError

MATTERS = 0.005
"""Shares of TTFT below this are called nothing."""
FULL = 0.7
"""Share of a link's capacity that is asked of it on average from which on it is often full."""
LEAST_ROOM = 1e-6
"""Below, the probabilities cancel in float64."""


@dataclass(frozen=True)
class Gain:
    """What a network-aware choice gains over one that is blind to the network, while links are not full."""

    gain: float
    """Share of mean TTFT removed, in [0, 1)."""
    blind: float
    """Mean seconds of transfer without it."""
    aware: float
    """Mean seconds of transfer with it."""
    transfer: float
    """Share of TTFT that transfer is without it, in [0, 1]."""
    ratio: float
    """Bandwidth of the fastest tier with endpoints over that of the slowest, at least 1."""
    near: float
    """Probability that an endpoint on the fastest tier has room, given that one has anywhere."""
    load: float
    """What a blind choice asks of the fullest link, as a share of its capacity."""
    verdict: str
    """One sentence."""


def gain(
    bandwidth: Sequence[float],
    endpoints: Sequence[int],
    nbytes: float,
    prefill: float,
    hit: float = 0.0,
    room: float = 1.0,
    load: float = 0.0,
) -> Gain:
    """What to expect.

    `bandwidth`: bytes a second that a transfer gets on each tier, or over each kind of link; `endpoints`:
    decode instances on each as seen from a prefill instance, on average; `nbytes`: of a prompt's KV, on
    average; `prefill`: seconds of TTFT that are not transfer; `hit`: share of the KV that the decode instance
    has already; `room`: probability that an instance has room; `load`: of the fullest link. Raises StropError
    where these make no sense.
    """
    _check(bandwidth, endpoints, nbytes, prefill, hit, room, load)
    size = nbytes * (1 - hit)
    tiers = sorted((b, n) for b, n in zip(bandwidth, endpoints, strict=True) if n)[::-1]
    rates, counts = np.array(tiers, dtype=np.float64).T
    seconds = size / rates
    full = (1 - room) ** np.cumsum([0, *counts])
    nearest = (full[:-1] - full[1:]) / (1 - full[-1])
    blind, aware = float(seconds @ counts / counts.sum()), float(seconds @ nearest)
    removed, share = max(blind - aware, 0) / (prefill + blind), blind / (prefill + blind)
    ratio = float(rates[0] / rates[-1])
    near = float(nearest[rates == rates[0]].sum())
    verdict = _verdict(removed, share, ratio, len(tiers), load)
    return Gain(removed, blind, aware, share, ratio, near, load, verdict)


def _check(
    bandwidth: Sequence[float],
    endpoints: Sequence[int],
    nbytes: float,
    prefill: float,
    hit: float,
    room: float,
    load: float,
) -> None:
    if len(bandwidth) != len(endpoints) or not all(isfinite(b) and b > 0 for b in bandwidth):
        raise StropError("give each tier a bandwidth above 0 and a number of endpoints")
    if min(endpoints, default=0) < 0 or not sum(endpoints):
        raise StropError("at least one tier needs an endpoint, and none fewer than 0")
    if not (isfinite(nbytes) and nbytes >= 0 and isfinite(prefill) and prefill > 0 and load >= 0):
        raise StropError("the KV's bytes and the load must be at least 0 and the seconds of prefill above 0")
    if not (0 <= hit <= 1 and LEAST_ROOM <= room <= 1):
        raise StropError(f"hit must be from 0 to 1, and room from {LEAST_ROOM} to 1")


def _verdict(gain: float, share: float, ratio: float, tiers: int, load: float) -> str:
    if tiers == 1:
        return "nothing to gain: all endpoints are on one tier"
    if ratio == 1 and load <= FULL:
        return "nothing to gain: the tiers with endpoints are equally fast"
    about = f"about {gain:.1%}" if gain < MATTERS else f"about {gain:.0%}"
    said = (
        f"{about} of TTFT while links are not full; tiers differ by {ratio:.1f}, "
        f"transfer is {share:.0%} of TTFT"
    )
    if load > FULL:
        return f"{said}; links will be full, asked for {load:.0%} of what they carry, and the gain larger"
    return f"nothing to gain: {said}" if gain < MATTERS else said


def gap_a_token(kv_bytes: float, hit: float, delta: float, near: float, far: float) -> float:
    """Seconds a prompt token that a far endpoint costs more than a near one; negative where it costs less.

    The far one holds a share `hit` of a prompt, the near one `hit - delta`; `near` and `far` are bandwidths.
    """
    return kv_bytes * ((1 - hit) / far - (1 - hit + delta) / near)


def crossover(
    kv_bytes: float, hit: float, delta: float, near: float, far: float, seconds: float = 0.0
) -> float:
    """Tokens of prompt above which the near endpoint is the better one, infinite where none is (T1).

    As `gap_a_token`; `seconds`: what the near one takes longer for other reasons.
    """
    gap = gap_a_token(kv_bytes, hit, delta, near, far)
    return inf if gap <= 0 else max(seconds / gap, 0.0)


def survives(near: float, c_near: float, far: float, c_far: float, eps: float) -> bool:
    """Whether the near tier is faster whatever congestion is, within `eps` of what was measured (T2)."""
    return near * (1 - c_near - eps) > far * (1 - c_far + eps)
