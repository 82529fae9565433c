"""The simulator against arithmetic: queues, pipelines, transfers, batches; and nothing lost or made up."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from fleets import POLICY, busy, fleet, pair, run, trace
from hypothesis import given, settings
from hypothesis import strategies as st
from routing import identical

from strop.core.errors import StropError
from strop.core.evict import ONLINE
from strop.serve.background import Constant, RandomWalk
from strop.serve.base import Job, Request, Trace
from strop.serve.batch import Batch
from strop.serve.cluster import Cluster, Group
from strop.serve.latency import Pipeline, Roofline
from strop.serve.routing import POLICIES
from strop.serve.simulate import Simulation
from strop.serve.topology import Flat


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
    assert identical(one, two)
    stay = one.columns["tier"] < 0  # under Splitwise: the iteration that ends a prompt gives its first token
    assert sum(n * b for n, _, _, b in one.spans) == one.columns["output"].sum() - stay.sum()
    assert not stay.any() or name == "splitwise"


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("shared", [False, True])
def test_memory_that_is_short_is_waited_for(name, shared):
    roles = ("both",) if shared else ("prefill", "decode")
    groups = tuple(
        Group(role=role, hosts=(i,), kv_tokens=11_000, batch=4, evict=name, holes=role != "decode")
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


def test_reports_are_as_old_as_their_period_lets_them_be():
    """Decisions at random times see reports of 0 to 0.5 s, 0.25 on average."""
    ages = []

    class Watching(type(POLICY)):
        def scores(self, request, endpoints, context, peer):
            ages.append(endpoints.age)
            return super().scores(request, endpoints, context, peer)

    stale = run(fleet(reports=0.5), busy(), Watching())
    assert min(ages) >= 0 and max(ages) <= 0.5 and np.mean(ages) == pytest.approx(0.25, abs=0.03)
    assert not np.array_equal(run(fleet(), busy()).columns["decode"], stale.columns["decode"])


def test_routers_of_both_roles_do_not_go_in_step():
    """On an idle fleet of 4 pods in turn, a quarter of the transfers stays in the pod."""
    made = trace([(20.0 * number, 1000, 2) for number in range(400)])
    tiers = run(fleet(), made, POLICIES["round-robin"]()).columns["tier"]
    assert np.mean(tiers == 2) == pytest.approx(0.25, abs=0.06)


def test_an_instance_that_waits_for_memory_does_not_look_idle():
    """The first prompt is computed after 0.2 s and leaves after 0.4 s: until then the others only wait."""
    simulation = Simulation(pair(kv_tokens=2048), trace([(0.0, 2000, 8)] * 4), POLICY)
    pool, seen = simulation.prefilling.pool, []
    simulation.clock.at(0.0, simulation._expect, 0)
    for time in (0.1, 0.39):
        simulation.clock.at(time, lambda: seen.append(pool.seen(simulation.clock.now).wait[0]))
    simulation.clock.run()
    assert seen == pytest.approx([0.1 + 3 * 0.2, 3 * 0.2])


def test_what_others_send_slows_transfers():
    quiet, loud = (run(fleet(background=Constant(share)), busy()) for share in (0.0, 0.8))
    assert loud.stages()["transfer"].mean() > 2 * quiet.stages()["transfer"].mean()


def test_quantiles_of_the_time_between_tokens_count_tokens():
    found = run(pair(), trace([(0.0, 100, 50)]))
    assert found.gaps([0.0, 0.5, 1.0]) == pytest.approx([0.01] * 3)


def test_a_request_that_no_instance_can_hold_is_named():
    with pytest.raises(StropError, match=r"request 0 of made takes 20,016 tokens of KV and an inst.* 9,000"):
        Simulation(pair(kv_tokens=9_000), trace([(0.0, 20_000, 1)]), POLICY)


def test_an_instance_that_prefills_has_to_hold_no_answer():
    cluster = pair(kv_tokens=9_000)
    prefill, decode = cluster.instances
    roomy = dataclasses.replace(cluster, instances=(prefill, dataclasses.replace(decode, kv_tokens=20_000)))
    found = run(roomy, trace([(0.0, 8_990, 2_000)]))
    assert found.columns["output"].tolist() == [2_000]
    with pytest.raises(StropError, match="9,008 tokens of KV and an instance for prefill holds 9,000"):
        Simulation(roomy, trace([(0.0, 9_001, 1)]), POLICY)


def test_a_policy_that_needs_hashes_refuses_a_trace_without():
    with pytest.raises(StropError, match="CacheAware needs to know which blocks requests share"):
        Simulation(pair(), trace([(0.0, 100, 1)]), POLICIES["cache-aware"]())


def test_the_fleet_needs_no_tensor_library():
    code = "import strop.serve.simulate, strop.serve.traces, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
