"""Splitwise's pools: when an instance is lent, to whom work goes then, and when it returns."""

import numpy as np
import pytest
from fleets import PLAIN, busy, pair, run, trace
from routing import context, fleet, identical

from strop.core.errors import StropError
from strop.serve.base import Request, Trace
from strop.serve.cluster import Cluster, Group
from strop.serve.latency import Pipeline
from strop.serve.routing import policy
from strop.serve.routing.jsq import JSQ
from strop.serve.routing.splitwise import Splitwise
from strop.serve.simulate import Simulation
from strop.serve.topology import Flat

STAGES = Pipeline(stages=3, prefill_base=0.01, prefill_token=1e-4, decode_stage=(0.01, 0.012))


def pools(prompts: int, answers: int, latency=PLAIN, **fields) -> Cluster:
    """So many instances for prompts, then so many for answers, a host each."""
    groups = tuple(
        Group(role=role, hosts=tuple(hosts), latency=latency, **fields)
        for role, hosts in (("prefill", range(prompts)), ("decode", range(prompts, prompts + answers)))
    )
    return Cluster(network=Flat(hosts=prompts + answers, bandwidth=1e9), instances=groups, kv_bytes=1e5)


def placed(cluster: Cluster, made: Trace, **fields) -> tuple[list[int], list[int]]:
    """Where prompts and answers of a trace are computed."""
    columns = run(cluster, made, Splitwise(**fields)).columns
    return columns["prefill"].tolist(), columns["decode"].tolist()


@pytest.mark.parametrize("latency", [PLAIN, STAGES])
def test_pools_that_lend_nothing_serve_as_instances_of_one_role_do(latency):
    made = trace([(0.1 * i, 500 + 37 * i, 5 + i) for i in range(60)])
    lending, apart = (run(pair(latency), made, each) for each in (Splitwise(pending=1e9), JSQ()))
    for name, values in apart.columns.items():
        if name != "decode":
            assert lending.columns[name] == pytest.approx(values, abs=1e-9), name
    assert lending.gap() == pytest.approx(apart.gap())


def test_prompts_are_lent_an_instance_where_the_queue_would_exceed_the_bound():
    """All come at once: the pool takes what fits in the bound, then what is lent, then one more is lent."""
    prompts, answers = placed(pools(1, 3), trace([(0.0, 1000, 2)] * 10), pending=3000)
    assert prompts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert answers == [1, 2, 3, 1, 2, 3, 2, 3, 3, 3]  # first those of their own pool that are not lent
    assert placed(pools(1, 3), trace([(0.0, 1000, 2)] * 3), pending=2999)[0] == [0, 0, 3]


def test_an_instance_without_a_queue_takes_a_prompt_beyond_the_bound():
    assert placed(pools(1, 2), trace([(0.0, 9000, 2), (5.0, 9000, 2)]))[0] == [0, 0]
    assert placed(pools(1, 2), trace([(0.0, 9000, 2), (0.0, 10, 2)]))[0] == [0, 2]


def test_answers_are_lent_an_instance_where_theirs_are_full():
    """By places or by memory; lent is where the least is scheduled, not where the fewest tokens wait."""
    made, held = trace([(0.0, 1500, 50), (0.1, 1000, 50), (0.17, 1000, 50)]), 1552 + 1056
    assert placed(pools(2, 1, batch=2), made) == ([0, 1, 0], [2, 2, 1])
    assert placed(pools(2, 1, kv_tokens=held + 1040), made) == ([0, 1, 0], [2, 2, 1])
    assert placed(pools(2, 1, kv_tokens=held + 1056), made) == ([0, 1, 0], [2, 2, 2])


def test_answers_go_where_the_least_memory_is_scheduled():
    made = trace([(0.0, 3000, 50)] + [(0.01 * i, 1000, 50) for i in range(1, 5)])
    assert placed(pools(1, 2), made)[1] == [1, 2, 2, 2, 1]


def test_who_is_lent_returns_when_nothing_is_left_to_do():
    """One place for answers: the second request stays where its prompt is, the fourth finds all at home."""
    made = trace([(0.0, 1000, 100), (0.0, 1000, 20), (0.3, 100, 5), (3.0, 1000, 100)])
    simulation, seen = Simulation(pools(2, 1, batch=1), made, Splitwise()), {}
    for time in (0.1, 0.29, 0.5, 2.9, 3.1):
        simulation.clock.at(time, lambda at=time: seen.update({at: simulation.lending.mixed().tolist()}))
    columns = simulation.run().columns
    simulation.check()
    assert columns["prefill"].tolist() == [0, 1, 0, 0] and columns["decode"].tolist() == [2, 1, 0, 2]
    assert columns["ended"][1:3].max() < 0.5
    none, lent = [False] * 3, [False, True, False]
    assert [seen[time] for time in (0.1, 0.29, 0.5, 2.9, 3.1)] == [lent, lent, none, none, none]


def test_a_lent_instance_reads_prompts_between_the_tokens_of_those_that_decode():
    found = run(pools(1, 1, batch=4), trace([(0.0, 100, 400), *[(1.0, 500, 5)] * 2]), Splitwise(pending=600))
    assert found.columns["prefill"].tolist()[2] == 1 == found.columns["decode"][2]
    assert found.spans[:, 1].max() == pytest.approx(0.01 + 500 * 1e-4)


def test_what_finds_neither_runs_where_fewest_tokens_are_pending():
    """Three places, which are taken or promised at once; a request counts as one token more."""
    prompts, answers = placed(pools(1, 2, batch=1), trace([(0.0, 100, 50)] * 12))
    assert prompts[:3] == [0, 0, 0] and answers[:3] == [1, 2, 0]
    assert prompts[3:] == answers[3:] == [1, 2, 1, 2, 1, 2, 0, 1, 2]


def test_no_request_is_given_to_an_instance_that_can_never_hold_it():
    small, large = pools(1, 1, batch=1, kv_tokens=1104).instances[0], pools(1, 1, batch=1).instances[1]
    cluster = Cluster(network=Flat(hosts=2), instances=(small, large), kv_bytes=1e5)
    assert placed(cluster, trace([(0.0, 1000, 500), (4.0, 1000, 200)])) == ([0, 1], [1, 1])


def unlike(seed: int) -> tuple[Simulation, int]:
    """Instances of all sizes that are much too few, and how many are for prompts."""
    rng = np.random.default_rng(seed)
    prompts, answers = rng.integers(1, 4, 2).tolist()
    groups = tuple(
        Group(
            role="prefill" if host < prompts else "decode",
            hosts=(host,),
            latency=PLAIN if rng.random() < 0.5 else STAGES,
            kv_tokens=int(rng.integers(9600, 30_000)),
            batch=int(rng.integers(1, 6)),
            evict=str(rng.choice(["lru", "asymcache"])),
            holes=bool(host < prompts and rng.random() < 0.5),
        )
        for host in range(prompts + answers)
    )
    cluster = Cluster(network=Flat(hosts=prompts + answers), instances=groups, kv_bytes=1e4)
    made = busy(120, seed)
    for job in made.jobs[::3]:
        job.output = 1
    return Simulation(cluster, made, Splitwise(pending=float(rng.choice([0, 500, 8192]))), seed), prompts


@pytest.mark.parametrize("seed", (0, 2, 3, 4, 5, 7, 8, 9, 10, 13, 15, 17))
def test_every_request_ends_once_within_memory_and_places(seed):
    simulation, prompts = unlike(seed)
    instances = simulation.lending.instances

    def look() -> None:
        for one in instances:
            one.store.check()
            assert one.batch.size + one._promised <= one.most

    for time in np.linspace(0, 60, 400):
        simulation.clock.at(float(time), look)
    found = simulation.run()
    simulation.check()
    assert all(one.idle for one in instances) and not simulation.lending.mixed().any()
    for name in ("running", "waiting", "queued"):
        assert not getattr(simulation.decoding.pool.live, name).any()
    columns, here = found.columns, found.columns["prefill"] == found.columns["decode"]
    assert sum(n * b for n, _, _, b in found.spans) == columns["output"].sum() - here.sum()
    short = columns["output"] == 1
    assert columns["ended"][short] == pytest.approx(columns["first"][short])
    assert ((columns["ended"] - columns["first"])[~short] > 0).all()
    lent = columns["prefill"] >= prompts, columns["decode"] < prompts
    assert here.any() and all(some[~here].any() for some in lent)


def test_runs_repeat():
    assert identical(*(unlike(3)[0].run() for _ in range(2)))


def test_where_instances_do_both_the_fewest_tokens_that_wait_decide():
    seen, endpoints = context(sent=[0, 0, 2]), fleet([0, 1, 2], queued=[9, 3, 4], running=[0, 4, 1])
    assert Splitwise().scores(Request(0, 100), endpoints, seen, None).tolist() == [9, 7, 7]


def test_a_bound_is_no_negative_number():
    assert policy("splitwise:pending=4096") == Splitwise(4096.0)
    with pytest.raises(StropError, match="pending must be at least 0"):
        policy("splitwise:pending=-1")
