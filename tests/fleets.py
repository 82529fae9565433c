"""Small fleets and traces, made up for tests, whose seconds add up by hand."""

import numpy as np

from strop.core.chunks import Fixed
from strop.serve.base import Job, Request, Trace
from strop.serve.cluster import Cluster, Group
from strop.serve.latency import Roofline
from strop.serve.routing import POLICIES
from strop.serve.simulate import Simulation
from strop.serve.topology import Flat

PLAIN = Roofline(prefill_token=1e-4, prefill_pair=0, iteration=0.01, decode_request=0, decode_token=0)
"""Seconds that add up by hand."""
POLICY = POLICIES["least-loaded"]()


def trace(jobs: list[tuple[float, int, int]], block: int = 16, shared: int = 0) -> Trace:
    """Arrival, prompt and answer of each request; the first `shared` blocks of all are the same."""
    found, fresh = [], iter(range(10**6, 10**9))
    for number, (arrival, prompt, output) in enumerate(jobs):
        count = -(-prompt // block) if shared else 0
        blocks = tuple(range(min(shared, count))) + tuple(next(fresh) for _ in range(count - shared))
        found.append(Job(Request(number, prompt, blocks), output, arrival))
    return Trace("made", found, block)


def pair(latency=PLAIN, **fields) -> Cluster:
    """One instance that computes prompts and one that decodes, at one switch."""
    both = {"latency": latency} | fields
    groups = (Group(role="prefill", hosts=(0,), **both), Group(role="decode", hosts=(1,), **both))
    return Cluster(network=Flat(hosts=2, bandwidth=1e9, rtt=0.002), instances=groups, kv_bytes=1e5)


def fleet(**fields) -> Cluster:
    """Eight instances of each role in four pods."""
    groups = (
        Group(role="prefill", hosts=(0, 2, 4, 6), each=2, kv_tokens=200_000),
        Group(role="decode", hosts=(1, 3, 5, 7), each=2, kv_tokens=200_000),
    )
    return Cluster(instances=groups, **fields)


def busy(requests: int = 400, seed: int = 0) -> Trace:
    """Requests of any length at any time within 40 s."""
    rng = np.random.default_rng(seed)
    arrivals = np.sort(rng.uniform(0, 40, requests))
    prompts, outputs = rng.integers(1, 9000, requests), rng.integers(1, 400, requests)
    jobs = zip(arrivals.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return trace(list(jobs), block=128, shared=2)


def run(cluster: Cluster, made: Trace, policy=POLICY, seed: int = 0):
    """What became of the requests, checked."""
    simulation = Simulation(cluster, made, policy, seed)
    results = simulation.run()
    simulation.check()
    return results


def both(**fields) -> Cluster:
    """One instance that does both, in chunks of 512 tokens."""
    group = Group(role="both", hosts=(0,), latency=PLAIN, chunk=Fixed(base=512), **fields)
    return Cluster(network=Flat(hosts=1), instances=(group,))
