"""How fast a group of devices would serve as one replica, prefilling, decoding or both (arXiv 2606.03770).

A pipeline of K stages with slowest stage T gives each request a token every K * T, with K micro-batches on
their way. A replica that does both is predicted as one whose stages take turns: a request costs each stage
its prompt, and its tokens at the stage's share of a micro-batch.
"""

import math
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np

from strop.core.errors import StropError
from strop.core.files import did_you_mean
from strop.serve.plan.costs import Costs, Load
from strop.serve.plan.devices import Device, Links
from strop.serve.plan.links import slowest_link_first
from strop.serve.plan.model import ModelShape
from strop.serve.plan.partition import Split, partition
from strop.serve.plan.plan import DECODE, MIXED, PREFILL, Replica
from strop.serve.plan.workload import Workload

SAME = 1e-12
"""Relative difference of speeds, or of phases, that counts as none."""


class Rates(NamedTuple):
    """What a group achieves; 0 where it cannot serve."""

    prefill: float
    """Prompt tokens a second; of a group that does both, requests a second."""
    decode: float
    """Tokens a second of all requests, each at least at the least speed."""
    concurrency: int
    """Requests that decode at once."""


class Layout(NamedTuple):
    """Where the blocks of a replica are."""

    order: Sequence[int]
    """Numbers of its devices."""
    first: Sequence[int]
    """The first block of each."""
    master: int
    """Which of them has the head."""


class Groups:
    """Every group of some devices as a replica of one model; a group is a bit mask."""

    def __init__(
        self, devices: Sequence[Device], links: Links, model: ModelShape, workload: Workload, min_tps: float
    ) -> None:
        if not 0 <= min_tps < math.inf:
            raise StropError(f"the least speed is a number of tokens a second from 0, got {min_tps}")
        for device in devices:
            for kind in set(device.types) - set(model.types):
                known = did_you_mean(kind, sorted(set(model.types)))
                raise StropError(
                    f"device {device.name} has times of {kind!r}, a type {model.name} lacks; {known}"
                )
        self.devices, self.links, self.model = list(devices), links, model
        self.workload, self.min_tps = workload, min_tps
        self.everyone = (1 << len(self.devices)) - 1
        self.costs = Costs(self.devices, links, model, workload)
        self._rates: dict[tuple[int, bool], Rates] = {}

    def members(self, mask: int) -> list[int]:
        """Numbers of the devices of a group."""
        return [k for k in range(len(self.devices)) if mask >> k & 1]

    def rates(self, mask: int, both: bool = False) -> Rates:
        """Of a replica that prefills or decodes, or of one that does `both`."""
        if (mask, both) not in self._rates:
            self._rates[mask, both] = self._both(mask) if both else self._either(mask)
        return self._rates[mask, both]

    def _either(self, mask: int) -> Rates:
        slowest = self.solve(mask, PREFILL)[0].slowest
        speed, choice = self.best(mask, DECODE, self.solve(mask, DECODE)[0].slowest)
        return Rates(self.workload.prompt / float(slowest[0]), speed, choice + 1 if speed else 0)

    def _both(self, mask: int) -> Rates:
        speed, choice = self.best(mask, MIXED, self.solve(mask, MIXED)[0].slowest)
        return Rates(speed, 0.0, choice + 1 if speed else 0)

    def tps(self, mask: int, role: str, slowest: np.ndarray) -> np.ndarray:
        """Tokens a second of each request `[B]` when all places are taken; 0 where it does not fit."""
        requests = np.arange(1, len(slowest) + 1)
        if role == DECODE:
            return 1 / (mask.bit_count() * slowest)
        return self.workload.output / (requests * slowest)

    def best(self, mask: int, role: str, slowest: np.ndarray) -> tuple[float, int]:
        """The best speed at which no request is slower than it may be, 0 where there is none, and its choice.

        Tokens a second of a replica that decodes, requests a second of one that does both.
        """
        tps = self.tps(mask, role, slowest)
        speeds = tps * np.arange(1, len(tps) + 1) if role == DECODE else 1 / slowest
        speeds = np.where(tps >= self.min_tps, speeds, 0.0)
        choice = int(np.flatnonzero(speeds >= speeds.max() * (1 - SAME))[-1])
        return float(speeds[choice]), choice

    def solve(self, mask: int, role: str) -> tuple[Split, list[list[int]]]:
        """The best split of a group for every concurrency, and the order of devices that each is for."""
        group = self.members(mask)
        load = self.costs.load(role, len(group))
        if not self.links.pairs or len(group) == 1:
            return self._split(group, role, load, slice(None)), [group] * len(load.micro)
        orders = self._orders(group, load)
        alike: dict[tuple[int, ...], list[int]] = {}
        for choice, order in enumerate(orders):
            alike.setdefault(tuple(order), []).append(choice)
        parts = [self._split(list(order), role, load, choices) for order, choices in alike.items()]
        at = np.argsort(np.concatenate(list(alike.values())))
        return Split(*(np.concatenate(part)[at] for part in zip(*parts, strict=True))), orders

    def _split(self, order: list[int], role: str, load: Load, rows: slice | list[int]) -> Split:
        """The dynamic programme over devices in an order, for some of the choices."""
        tables = [self.costs.table(k, role, len(order)) for k in order]
        transfer = [
            np.zeros(len(load.micro)),
            *(self.costs.transfer(*pair, load) for pair in pairwise(order)),
        ]
        return partition(
            np.array([plain[rows] for plain, _ in tables]),
            np.array([master[rows] for _, master in tables]),
            np.array(transfer)[:, rows],
        )

    def _orders(self, group: list[int], load: Load) -> list[list[int]]:
        """For each choice the order whose slowest link is fastest: blocks are equal, the rest is alike.

        It follows from the ranks of the links, which hardly change from choice to choice.
        """
        pairs = list(combinations(group, 2))
        known: dict[tuple[int, ...], list[int]] = {}
        orders = []
        for costs in np.array([self.costs.transfer(*pair, load) for pair in pairs]).T:
            ranks = tuple(np.unique(costs, return_inverse=True)[1].tolist())
            if ranks not in known:
                both_ways = [*pairs, *((b, a) for a, b in pairs)]
                known[ranks] = slowest_link_first(group, dict(zip(both_ways, 2 * ranks, strict=True)))
            orders.append(known[ranks])
        return orders

    def replica(self, mask: int, role: str) -> Replica:
        """A group's best replica in a role that it can serve in."""
        split, orders = self.solve(mask, role)
        speed, choice = self.best(mask, role, split.slowest)
        if role == PREFILL:
            speed, choice = self.workload.prompt / float(split.slowest[0]), 0
        layout = Layout(orders[choice], split.first[choice].tolist(), int(split.master[choice]))
        return self.built(layout, role, speed, choice)

    def fixed(self, layout: Layout) -> np.ndarray:
        """Seconds of the slowest stage `[B]` of a replica that does both, by a given layout."""
        stages = len(layout.order)
        load = self.costs.load(MIXED, stages)
        ends = [*(first - 1 for first in layout.first[1:]), self.model.blocks - 1]
        found = [self.costs.transfer(*pair, load) for pair in pairwise(layout.order)]
        for k, (number, first, last) in enumerate(zip(layout.order, layout.first, ends, strict=True)):
            found.append(self.costs.table(number, MIXED, stages)[k == layout.master][:, first, last])
        return np.max(found, axis=0)

    def built(self, layout: Layout, role: str, speed: float, choice: int) -> Replica:
        """The replica as a plan has it, for a choice of concurrency."""
        ends = [*(first - 1 for first in layout.first[1:]), self.model.blocks - 1]
        stages, kept = [], []
        for k, number in enumerate(layout.order):
            run, master = (layout.first[k], ends[k]), k == layout.master
            need = self.costs.need(role, len(layout.order), choice, *run, master)
            count = np.array(ends[k] - layout.first[k] + 1)
            offloaded = int(self.costs.offloaded(self.devices[number], np.array(need), count))
            before = layout.order[k - 1] if k else None
            stages.append(self.costs.stage(number, before, run, master, offloaded))
            kept.append(self.costs.kept_tokens(number, run, master, offloaded))
        return Replica(role, 0 if role == PREFILL else choice + 1, speed, int(min(kept)), tuple(stages))
