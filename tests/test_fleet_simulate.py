"""The simulator against arithmetic: queues, pipelines, transfers, batches; and nothing lost or made up."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.core.errors import StropError
from strop.serve.background import Constant, RandomWalk
from strop.serve.base import Job, Request, Trace
from strop.serve.batch import Batch
from strop.serve.chunks import Fixed
from strop.serve.cluster import Cluster, Group
from strop.serve.evict import EVICTORS
from strop.serve.latency import Pipeline, Roofline
from strop.serve.routing import POLICIES
from strop.serve.simulate import Simulation
from strop.serve.topology import FatTree, Flat

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
    groups = (
        Group(role="prefill", hosts=(0, 2, 4, 6), each=2, kv_tokens=200_000),
        Group(role="decode", hosts=(1, 3, 5, 7), each=2, kv_tokens=200_000),
    )
    return Cluster(instances=groups, **fields)


def busy(requests: int = 400, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    arrivals = np.sort(rng.uniform(0, 40, requests))
    prompts, outputs = rng.integers(1, 9000, requests), rng.integers(1, 400, requests)
    jobs = zip(arrivals.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return trace(list(jobs), block=128, shared=2)


def run(cluster: Cluster, made: Trace, policy=POLICY, seed: int = 0):
    simulation = Simulation(cluster, made, policy, seed)
    results = simulation.run()
    simulation.check()
    return results


def test_a_request_alone_takes_what_its_parts_take():
    found = run(pair(), trace([(1.0, 1000, 5)]))
    stages = {name: values[0] for name, values in found.stages().items()}
    assert stages["queue"] == 0 and stages["prefill"] == pytest.approx(0.1)
    assert stages["transfer"] == pytest.approx(0.001 + 1000 * 1e5 / 1e9)
    assert stages["first decode"] == pytest.approx(0.01)
    assert found.columns["ended"][0] == pytest.approx(1 + 0.1 + 0.101 + 5 * 0.01)
    assert found.tpot()[0] == pytest.approx(0.01)


def test_waiting_for_prefill_is_that_of_a_queue_with_one_server():
    """M/D/1: rho S / (2 (1 - rho)) on average."""
    service, load, requests = 0.1, 0.7, 12_000
    gaps = np.random.default_rng(3).exponential(service / load, requests)
    jobs = [(float(t), 1000, 1) for t in np.cumsum(gaps)]
    found = run(pair(), trace(jobs))
    expected = load * service / (2 * (1 - load))
    assert found.stages()["queue"].mean() == pytest.approx(expected, rel=0.06)


def test_a_pipeline_starts_a_prompt_a_stage_and_takes_all_stages_for_each():
    latency = Pipeline(stages=4, prefill_token=1e-4, decode_stage=(0.01, 0.012))
    found = run(pair(latency), trace([(0.0, 1000, 1)] * 5))
    assert found.columns["begun"] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert found.columns["computed"] - found.columns["begun"] == pytest.approx([0.4] * 5)


def test_requests_of_a_pipeline_are_spread_over_its_stages():
    latency = Pipeline(stages=2, prefill_token=1e-4, decode_stage=(0.01, 0.012))
    assert [latency.decode(b)[0] for b in range(6)] == pytest.approx([0, 0.02, 0.02, 0.024, 0.024, 0.048])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_batch_taken_forward_is_a_batch_step_by_step(seed):
    """Joins at random times; the reference makes one iteration at a time."""
    rng = np.random.default_rng(seed)
    latency = Roofline(iteration=0.01, decode_request=0.001, decode_token=float(rng.choice([0, 2e-7])))
    jobs = [
        (float(t), int(held), int(left))
        for t, held, left in zip(
            np.sort(rng.uniform(0, 3, 12)), rng.integers(0, 5000, 12), rng.integers(1, 200, 12), strict=True
        )
    ]
    batch, ended = Batch(latency), {}
    pending = list(enumerate(jobs))
    while pending or batch.size:
        if not batch.size:
            batch.start(max(batch.time, pending[0][1][0]))
        while pending and pending[0][1][0] <= batch.time:
            number, (_, held, left) = pending.pop(0)
            batch.join(number, held, left)
        n = batch.until_end()
        if pending:
            n = min(n, batch.done_by(pending[0][1][0]) + 1)
        batch.advance(n)
        ended |= dict.fromkeys(batch.leave(), batch.time)
    assert ended == pytest.approx(step_by_step(latency, jobs), rel=1e-9)
    assert batch.held == 0 and sum(n * b for n, _, _, b in batch.spans) == sum(left for _, _, left in jobs)


def step_by_step(latency: Roofline, jobs: list[tuple[float, int, int]]) -> dict[int, float]:
    """When each of (arrival, tokens held, tokens to give) ends, one iteration after another."""
    time, pending, running, ended = 0.0, list(enumerate(jobs)), {}, {}
    while pending or running:
        if not running:
            time = max(time, pending[0][1][0])
        while pending and pending[0][1][0] <= time:
            number, (_, held, left) = pending.pop(0)
            running[number] = [held, left]
        fixed, token = latency.decode(len(running))
        time += fixed + token * sum(held for held, _ in running.values())
        for number, state in list(running.items()):
            state[0] += 1
            state[1] -= 1
            if not state[1]:
                ended[number] = time
                del running[number]
    return ended


def test_who_comes_during_an_iteration_joins_at_its_end():
    found = run(pair(), trace([(0.0, 1000, 100), (0.05, 1037, 3)]))
    start = found.columns["moved"][0]
    joined = found.columns["first"][1] - 0.01
    assert joined >= found.columns["moved"][1] > joined - 0.01
    assert (joined - start) / 0.01 == pytest.approx(round((joined - start) / 0.01))


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_is_lost_under_any_policy_and_runs_repeat(name):
    cluster, made = fleet(background=RandomWalk(), reports=0.5), busy()
    one, two = (run(cluster, made, POLICIES[name](), seed=4) for _ in range(2))
    assert all(np.array_equal(one.columns[key], two.columns[key]) for key in one.columns)
    assert np.array_equal(one.spans, two.spans) and one.events == two.events
    assert sum(n * b for n, _, _, b in one.spans) == one.columns["output"].sum()


@pytest.mark.parametrize("name", [name for name in EVICTORS if name != "belady"])
@pytest.mark.parametrize("shared", [False, True])
def test_memory_that_is_short_is_waited_for(name, shared):
    roles = ("both",) if shared else ("prefill", "decode")
    groups = tuple(
        Group(role=role, hosts=(i,), kv_tokens=11_000, batch=4, evict=name, holes=True)
        for i, role in enumerate(roles)
    )
    cluster = Cluster(network=Flat(hosts=2), instances=groups, kv_bytes=100)
    found = run(cluster, busy(60))
    assert found.spans[:, 3].max() <= 4 and found.stages()["transfer" if not shared else "queue"].max() > 1


def test_a_prompt_that_is_cached_is_neither_computed_nor_sent():
    jobs = [(0.0, 160, 1), (5.0, 160, 1)]
    found = run(pair(), trace(jobs, shared=10))
    assert found.columns["reused"].tolist() == [0, 159] and found.columns["hit"].tolist() == [0, 160]
    assert found.stages()["transfer"][1] == pytest.approx(0.001)


def test_a_later_turn_comes_when_the_one_before_has_ended():
    later = Job(Request(1, 100), 4)
    made = Trace("session", [Job(Request(0, 100), 8, 0.0, next=later, gap=2.5)], 16)
    found = run(pair(), made)
    assert found.columns["arrived"][1] == pytest.approx(found.columns["ended"][0] + 2.5)


def both(**fields) -> Cluster:
    group = Group(role="both", hosts=(0,), latency=PLAIN, chunk=Fixed(base=512), **fields)
    return Cluster(network=Flat(hosts=1), instances=(group,))


def test_a_prompt_in_chunks_takes_an_iteration_for_each():
    found = run(both(), trace([(0.0, 1000, 3)]))
    assert found.ttft()[0] == pytest.approx(1000 * 1e-4 + 2 * 0.01)
    assert found.columns["ended"][0] == pytest.approx(0.12 + 2 * 0.01)


def test_a_chunk_slows_the_iteration_of_those_that_decode():
    found = run(both(), trace([(0.0, 100, 200), (0.5, 500, 1)]))
    assert found.spans[:, 1].max() == pytest.approx(0.01 + 500 * 1e-4)
    tokens = sum(n * b for n, _, _, b in found.spans)
    assert (
        tokens == found.columns["output"].sum() - 2
    )  # the iteration that ends a prompt gives its first token


def test_stale_reports_change_what_a_router_sees_and_not_what_is_served():
    fresh, stale = (run(fleet(reports=seconds), busy()) for seconds in (0.0, 5.0))
    assert not np.array_equal(fresh.columns["decode"], stale.columns["decode"])
    assert fresh.columns["output"].sum() == stale.columns["output"].sum()


def test_what_others_send_slows_transfers():
    quiet, loud = (run(fleet(background=Constant(share)), busy()) for share in (0.0, 0.8))
    assert loud.stages()["transfer"].mean() > 2 * quiet.stages()["transfer"].mean()


def test_quantiles_of_the_time_between_tokens_count_tokens():
    found = run(pair(), trace([(0.0, 100, 50)]))
    assert found.gaps([0.0, 0.5, 1.0]) == pytest.approx([0.01] * 3)


def test_a_request_that_no_instance_can_hold_is_named():
    with pytest.raises(StropError, match=r"request 0 of made takes 20,016 tokens of KV and an inst.* 9,000"):
        Simulation(pair(kv_tokens=9_000), trace([(0.0, 20_000, 1)]), POLICY)


def test_a_policy_that_needs_hashes_refuses_a_trace_without():
    with pytest.raises(StropError, match="CacheAware needs to know which blocks requests share"):
        Simulation(pair(), trace([(0.0, 100, 1)]), POLICIES["cache-aware"]())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"instance": []}, "cluster has no field 'instance'.*did you mean 'instances'"),
        ({"instances": []}, "a cluster lists its `instances`, at least one group"),
        ({"instances": [{"role": "prefil", "hosts": [0]}]}, "role must be one of prefill, decode, both"),
        ({"instances": [{"role": "both", "hosts": [9]}]}, "host 9 is not in a network of 8"),
        ({"instances": [{"role": "decode", "hosts": [0]}]}, "some prefill and the others decode"),
        ({"instances": [{"role": "both", "hosts": [0], "evict": "lri"}]}, "unknown evictor 'lri'"),
        ({"network": {"fat_tre": {}}}, "unknown cluster.network 'fat_tre'; did you mean 'fat_tree'"),
        ({"network": {"flat": {"hosts": 8, "bandwidth": -1}}}, "bandwidth must be a finite number above 0"),
        ({"network": {"flat": {"hosts": 8, "bandwidth": 0}}}, "bandwidth must be a finite number above 0"),
        ({"network": {"flat": {"hosts": "8"}}}, "cluster.network.flat.hosts must be int, got '8'"),
        ({"kv_bytes": 0}, "kv_bytes must be above 0"),
        ({"telemetry": math.nan}, "telemetry must be above 0"),
        ({"strop": 2}, "starts with `strop: 1`"),
    ],
)
def test_a_wrong_cluster_is_refused_in_one_sentence(change, said):
    data = {"strop": 1, "instances": [{"role": "both", "hosts": [0]}]}
    with pytest.raises(StropError, match=said):
        Cluster.from_dict(data | change)


def test_a_cluster_file_says_what_its_objects_say(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "strop: 1\nnetwork: {fat_tree: {pods: 2}}\nbackground: {constant: {share: 0.1}}\n"
        "instances:\n- {role: prefill, hosts: [0, 2]}\n- role: decode\n  hosts: [1, 3]\n  each: 2\n"
        "  latency: {pipeline: {stages: 2, prefill_token: 0.001, decode_stage: [0.1]}}\n"
    )
    found = Cluster.load(tmp_path / "c.yaml")
    pipeline = Pipeline(stages=2, prefill_token=0.001, decode_stage=(0.1,))
    groups = (
        Group(role="prefill", hosts=(0, 2)),
        Group(role="decode", hosts=(1, 3), each=2, latency=pipeline),
    )
    assert found == Cluster(network=FatTree(pods=2), background=Constant(0.1), instances=groups)
    assert dataclasses.is_dataclass(found) and len(found.of("decode")) == 4


def test_the_fleet_needs_no_tensor_library():
    code = "import strop.serve.simulate, strop.serve.traces, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
