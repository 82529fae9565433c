"""Every partition of the devices, from tables of all groups: the optimum, for a dozen devices at most."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from strop.core.errors import StropError
from strop.serve.plan.plan import Report
from strop.serve.plan.replica import Groups
from strop.serve.plan.search import Found, Search, all_masks

MOST = 12
"""Devices, of which there are 4,213,597 partitions."""
ENTRIES = 1 << 20
"""Of a table of phases."""


@dataclass(frozen=True, kw_only=True)
class Exhaustive(Search):
    """The best of all partitions and roles."""

    name: str = "exhaustive"

    def search(self, groups: Groups, report: Report) -> Found:
        """The best partition; ties go to what the objective says, then to fewer groups."""
        count = len(groups.devices)
        if count > MOST:
            raise StropError(f"{count} devices have too many partitions to try all: use --planner genetic")
        table, masks = np.zeros((groups.everyone + 1, 3)), all_masks(groups)
        for done, mask in enumerate(masks):
            table[mask] = self.objective.rates(groups, mask)
            report("groups of devices", 0.9 * done / len(masks))
        best, key = Found(np.inf, (groups.everyone,), np.zeros(1, dtype=bool)), (np.inf, np.inf)
        for size in range(1, count + 1):
            report(f"partitions into {size}", 0.9 + 0.1 * size / count)
            several = partitions(count, size)
            while rows := list(islice(several, max(ENTRIES >> size, 1))):
                parts = np.array(rows)
                judged = self.objective.judge(table[parts], groups)
                at = int(np.lexsort((*judged.ties.T[::-1], np.round(judged.phase, 12)))[0])
                now = (round(float(judged.phase[at]), 12), *judged.ties[at])
                if now < key:
                    best, key = Found(float(judged.phase[at]), rows[at], judged.prefill[at]), now
        return best


def partitions(count: int, groups: int) -> Iterator[tuple[int, ...]]:
    """Every way to part `count` devices into so many groups, each a bit mask."""
    if groups == 0 or count < groups:
        if count == groups == 0:
            yield ()
        return
    last = 1 << (count - 1)
    for parts in partitions(count - 1, groups - 1):
        yield *parts, last
    for parts in partitions(count - 1, groups):
        for k, mask in enumerate(parts):
            yield *parts[:k], mask | last, *parts[k + 1 :]
