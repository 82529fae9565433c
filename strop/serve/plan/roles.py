"""Which replicas prefill and which decode: every assignment of roles (arXiv 2606.03770).

An objective judges partitions of the devices, many at once: rows of `[P, R, 3]` are prompt tokens a second,
tokens a second and concurrency of each of R replicas.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from strop.serve.plan.plan import DECODE, MIXED, PREFILL
from strop.serve.plan.replica import SAME, Groups, Rates

EXACT = 12
"""Replicas up to which all 2^R - 2 assignments are tried; beyond, only those that are prefixes when sorted by
what speaks for prefill."""


class Judged(NamedTuple):
    """The best assignment of each partition."""

    phase: np.ndarray
    """Seconds a request `[P]`; infinite where none serves."""
    prefill: np.ndarray
    """Which replicas prefill `[P, R]`."""
    ties: np.ndarray
    """What decides between equal phases `[P, 4]`, lower first."""


class Objective(ABC):
    """What makes a partition good."""

    @abstractmethod
    def rates(self, groups: Groups, mask: int) -> Rates:
        """What it needs to know of a group."""

    @abstractmethod
    def judge(self, rates: np.ndarray, groups: Groups) -> Judged:
        """The best assignment for each row of `[P, R, 3]`."""

    @abstractmethod
    def roles(self, prefill: np.ndarray) -> list[str]:
        """Of the replicas of one partition."""


@dataclass(frozen=True)
class Disaggregated(Objective):
    """Each replica prefills or decodes; the phase is that of the busier role."""

    min_replicas: int = 1
    """Of each role, so that one device's end is not the fleet's."""
    ordered: bool = False
    """Adapted Splitwise: whatever prefills does so at least as fast as whatever decodes could."""

    def rates(self, groups: Groups, mask: int) -> Rates:
        """Of either role."""
        return groups.rates(mask)

    def judge(self, rates: np.ndarray, groups: Groups) -> Judged:
        """Ties: fewer replicas without work in their role, fewer that prefill, more places, lower numbers."""
        prompt, speed, places = np.moveaxis(rates, -1, 0)
        size = groups.workload
        chosen = assignments(prompt, speed, self.ordered)
        if not chosen.shape[1]:
            return Judged(np.full(len(rates), np.inf), np.zeros_like(prompt, bool), np.zeros((len(rates), 4)))
        taken = chosen.astype(float)
        with np.errstate(divide="ignore"):
            phase = np.maximum(size.prompt / _sums(taken, prompt), size.output / _sums(1 - taken, speed))
        useful = _sums(taken, prompt > 0), _sums(1 - taken, speed > 0)
        fits = np.minimum(*useful) >= self.min_replicas
        if self.ordered:
            slowest = np.where(chosen & (prompt > 0)[:, None], prompt[:, None], np.inf).min(-1)
            fits &= slowest >= np.where(chosen | (speed <= 0)[:, None], 0.0, prompt[:, None]).max(-1)
        phase = np.where(fits, phase, np.inf)
        chosen = np.broadcast_to(chosen, (*phase.shape, chosen.shape[-1]))
        wasted = ((prompt > 0) | (speed > 0)).sum(-1)[:, None] - useful[0] - useful[1]
        ties = np.stack([wasted, chosen.sum(-1), -_sums(1 - taken, places), _code(chosen)], -1)
        best = phase.min(-1)
        near = phase <= best[:, None] * (1 + SAME)
        at = np.array([_first(ties[p], near[p]) for p in range(len(rates))])
        rows = np.arange(len(rates))
        return Judged(best, chosen[rows, at], ties[rows, at])

    def roles(self, prefill: np.ndarray) -> list[str]:
        """Prefill or decode."""
        return [PREFILL if one else DECODE for one in prefill]


@dataclass(frozen=True)
class Mixed(Objective):
    """No disaggregation: every replica prefills and decodes, and requests are shared out by speed."""

    def rates(self, groups: Groups, mask: int) -> Rates:
        """Of both roles together."""
        return groups.rates(mask, both=True)

    def judge(self, rates: np.ndarray, groups: Groups) -> Judged:
        """Ties: more places."""
        with np.errstate(divide="ignore"):
            phase = 1 / rates[..., 0].sum(-1)
        ties = np.zeros((len(rates), 4))
        ties[:, 2] = -rates[..., 2].sum(-1)
        return Judged(phase, np.zeros(rates.shape[:2], dtype=bool), ties)

    def roles(self, prefill: np.ndarray) -> list[str]:
        """Mixed, all of them."""
        return [MIXED] * len(prefill)


def assignments(prompt: np.ndarray, speed: np.ndarray, ordered: bool = False) -> np.ndarray:
    """Role vectors `[1 or P, V, R]` to try for rates `[P, R]`, true for prefill; each has both roles."""
    replicas = prompt.shape[1]
    if replicas <= EXACT:
        return _all(replicas)[None]
    with np.errstate(divide="ignore", invalid="ignore"):
        keys = [prompt] if ordered else [prompt, np.nan_to_num(prompt / speed, nan=0.0)]
    ranks = [np.argsort(np.argsort(-key, -1, kind="stable"), -1) for key in keys]
    return np.concatenate([rank[:, None] < np.arange(1, replicas)[:, None] for rank in ranks], 1)


@lru_cache(EXACT)
def _all(replicas: int) -> np.ndarray:
    codes = np.arange(1, max(2**replicas - 1, 1))
    return (codes[:, None] >> np.arange(replicas)[::-1] & 1).astype(bool)


def _sums(taken: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Of the values `[P, R]` that each vector takes `[P, V]`."""
    return np.matmul(taken, values[..., None].astype(float))[..., 0]


def _code(chosen: np.ndarray) -> np.ndarray:
    """A role vector as a number, decode before prefill."""
    return chosen @ 2.0 ** -np.arange(chosen.shape[-1])


def _first(ties: np.ndarray, near: np.ndarray) -> int:
    """Which of the `near` rows of `[V, 4]` is lowest."""
    at = np.flatnonzero(near)
    return int(at[np.lexsort(ties[at].T[::-1])[0]]) if len(at) > 1 else int(at[0]) if len(at) else 0
