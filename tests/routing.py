"""What a router sees, made up for tests: a network, endpoints, random states."""

from dataclasses import dataclass

import numpy as np

from strop.serve.base import Context, Endpoints, LocalState, Request
from strop.serve.results import Results


@dataclass
class Oracle:
    """A network where the number of a host is its tier from any peer."""

    bandwidth: np.ndarray
    latency: np.ndarray
    taken: np.ndarray

    def tier(self, peer: int, node: np.ndarray) -> np.ndarray:
        return node % 4

    def way(self, peer: int, node: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.bandwidth[node % 4], self.latency[node % 4]

    def congestion(self, now: float) -> np.ndarray:
        return self.taken


def fleet(tiers, hits=0, **columns) -> Endpoints:
    """Idle endpoints with room for any prompt, on tiers; `columns` say what is otherwise."""
    count = len(tiers)
    none, nothing = np.zeros(count, dtype=np.int64), np.zeros(count)
    held = none + np.asarray(hits)
    given = {
        "capacity": nothing + np.inf,
        "free": nothing + np.inf,
        "running": none,
        "waiting": none,
        "queued": none,
        "wait": nothing,
        "step": nothing,
    } | {name: np.asarray(value) for name, value in columns.items()}
    return Endpoints(node=np.asarray(tiers), **given, hits=lambda request: held)


def context(
    bandwidth=(8, 4, 2, 1), latency=(0,) * 4, taken=(0,) * 4, flows=None, sent=0, kv_bytes=1.0, rng=None
) -> Context:
    """What a decision may rest on; with a generator only where one is given."""
    oracle = Oracle(*(np.asarray(each, dtype=np.float64) for each in (bandwidth, latency, taken)))
    local = LocalState(sent=np.asarray(sent), flows=flows or {})
    return Context(0.0, local, oracle, kv_bytes, rng)


def random_states(seed: int, number: int, exact: bool):
    """Requests and what a router sees. `exact`: few values, all of them dyadic, so that ties are exact."""
    rng, most = np.random.default_rng(seed), 12

    def some(values, size):
        """Of the values, or between the least and the most."""
        if exact:
            return np.array(values)[rng.integers(0, len(values), (number, size))]
        return min(values) + (max(values) - min(values)) * rng.random((number, size))

    prompts = rng.choice([1, 64, 512, 2000], (number, 1))
    node, running, waiting, sent = (rng.integers(0, top, (number, most)) for top in (4, 3, 3, 4))
    hits = rng.choice([0, 32, 512, 600], (number, most))
    free = (prompts - (rng.random((number, most)) < 0.3)) * rng.integers(0, 3, (number, most))
    wait, step = some([0.0, 0.5, 1.0], most), some([0.25, 0.5], most)
    rows = {"free": free, "running": running, "waiting": waiting, "wait": wait, "step": step}
    network = some([1.0, 2.0, 4.0, 64.0], 4), some([0.0, 0.25], 4), some([0.0, 0.5, 0.75], 4)
    n_in = rng.integers(0, 3, (number, 4)).tolist()
    for i, tiers in enumerate(zip(*network, strict=True)):
        few = slice(int(rng.integers(1, most + 1)))
        endpoints = fleet(node[i, few], hits[i, few], **{name: each[i, few] for name, each in rows.items()})
        flows = {(7, 1): n_in[i][0], (7, 3): n_in[i][1], (0, 1): n_in[i][2], (0, 2): n_in[i][3]}
        yield Request(i, int(prompts[i, 0])), endpoints, context(*tiers, flows, sent[i, few], 0.25)


def identical(one: Results, other: Results) -> bool:
    """Whether two runs are the same, bit for bit."""
    columns = all(np.array_equal(values, other.columns[name]) for name, values in one.columns.items())
    return columns and np.array_equal(one.spans, other.spans) and one.events == other.events
