"""What a choice by network can gain, and weights found on jobs that are not measured."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing import context, fleet

from strop.core.errors import StropError
from strop.serve.background import Constant, RandomWalk, Windows
from strop.serve.base import Job, Request, Trace
from strop.serve.cluster import Cluster, Group
from strop.serve.experiment import Settings, alike, expect, experiment
from strop.serve.gain import gain
from strop.serve.latency import Pipeline
from strop.serve.routing import policy
from strop.serve.routing.netkv import NetKVStatic
from strop.serve.simulate import Simulation
from strop.serve.topology import FatTree
from strop.serve.traces import fixed
from strop.serve.tuning import tune

MOONCAKE = {"bandwidth": (450e9, 12.5e9, 5e9, 2.5e9), "nbytes": 12_035 * 327_680, "prefill": 0.977}


@pytest.mark.parametrize("room", [1.0, 0.4])
def test_the_bound_is_what_blind_and_static_picks_take_on_average(room):
    rng, counts = np.random.default_rng(7), (1, 0, 2, 5)
    tiers, request = np.repeat(np.arange(4), counts), Request(0, 1000)
    seen = context(MOONCAKE["bandwidth"], kv_bytes=MOONCAKE["nbytes"] * 0.75 / 1000)
    seconds = NetKVStatic().scores(request, fleet(tiers), seen, 0)
    blind, aware = [], []
    while len(aware) < 4000:
        free = rng.random(8) < room
        if free.any():
            some = fleet(tiers, free=np.where(free, 1000, 0))
            aware.append(seconds[NetKVStatic().pick(request, some, seen, 0).endpoint])
            blind.append(seconds[rng.choice(np.flatnonzero(free))])
    bound = gain(**MOONCAKE, endpoints=counts, hit=0.25, room=room)
    for expected, found in ((bound.blind, blind), (bound.aware, aware)):
        assert abs(expected - np.mean(found)) <= 4 * np.std(found) / len(found) ** 0.5 + 1e-9
    assert bound.gain == pytest.approx((bound.blind - bound.aware) / (0.977 + bound.blind))


def test_a_bound_by_hand_says_its_numbers_in_one_sentence():
    half = gain((1, 1, 4e9, 2e9), (0, 0, 1, 1), 4e9, 2.0)
    assert (half.blind, half.aware, half.ratio, half.near) == (1.5, 1.0, 2.0, 1.0)
    said = "about 14% of TTFT while links are not full; tiers differ by 2.0, transfer is 43% of TTFT"
    assert half.verdict == said
    full = gain((1, 1, 4e9, 2e9), (0, 0, 1, 1), 4e9, 2.0, load=1.2)
    assert full.gain == half.gain and full.verdict == (
        f"{said}; links will be full, asked for 120% of what they carry, and the gain larger"
    )
    assert gain((1, 1, 4e9, 2e9), (0, 0, 1, 1), 4e9, 2.0, room=0.5).near == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("bandwidth", "endpoints", "nbytes", "reason"),
    [
        ((9, 9, 5, 5), (0, 0, 2, 2), 10, "the tiers with endpoints are equally fast"),
        ((9, 9, 5, 1), (0, 0, 0, 2), 10, "all endpoints are on one tier"),
        (
            (9, 9, 5, 1),
            (0, 0, 2, 2),
            0,
            "about 0.0% of TTFT while links are not full; tiers differ by 5.0, transfer is 0% of TTFT",
        ),
    ],
)
def test_there_is_nothing_to_gain_where_tiers_tie_or_nothing_travels(bandwidth, endpoints, nbytes, reason):
    found = gain(bandwidth, endpoints, nbytes, 1.0)
    assert (found.gain, found.verdict) == (0, f"nothing to gain: {reason}")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e6, 1e12), st.integers(0, 50)), min_size=1, max_size=4).filter(
        lambda tiers: any(count for _, count in tiers)
    ),
    st.floats(0, 1e12),
    st.floats(1e-3, 1e3),
    st.floats(0, 1),
    st.floats(1e-6, 1),
)
def test_a_bound_is_a_share_below_that_of_transfer_and_falls_with_hits(tiers, nbytes, prefill, hit, room):
    found = gain(*zip(*tiers, strict=True), nbytes, prefill, hit, room)
    assert 0 <= found.gain <= found.transfer <= 1 and found.ratio >= 1 and 0 <= found.near <= 1 + 1e-9
    assert found.aware <= found.blind * (1 + 1e-9)
    cold = gain(*zip(*tiers, strict=True), nbytes, prefill, 0.0, room)
    assert found.gain <= cold.gain + 1e-9


@pytest.mark.parametrize(
    "wrong",
    [
        {"bandwidth": (1, 2, 3)},
        {"bandwidth": (0, 1, 1, 1)},
        {"endpoints": (0, 0, 0, 0)},
        {"endpoints": (-1, 2, 2, 2)},
        {"nbytes": -1},
        {"prefill": 0},
        {"hit": 1.5},
        {"room": 0},
        {"load": -1},
    ],
)
def test_a_bound_of_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(StropError):
        gain(**({**MOONCAKE, "endpoints": (1, 1, 1, 1)} | wrong))


PODS = {"prefill": (0, 2, 4, 6), "decode": (1, 3, 5, 7)}
"""Hosts in the four pods of `FatTree`: half of each pod prefills."""


def cluster(background=None, hosts=PODS, **network) -> Cluster:
    groups = tuple(Group(role=role, hosts=hosts[role], each=2) for role in hosts)
    return Cluster(network=FatTree(**network), instances=groups, background=background)


def simulated(fleet_: Cluster, trace: Trace) -> float:
    """Share of mean TTFT that NetKV takes off round-robin's."""
    blind, aware = (
        Simulation(fleet_, trace, policy(name)).run().ttft().mean() for name in ("round-robin", "netkv")
    )
    return 1 - aware / blind


@pytest.mark.parametrize(
    "background",
    [None, Constant(0.5), RandomWalk(low=0.5, high=0.9), Windows(share=0.8, length=60.0, every=60.0)],
    ids=lambda one: type(one).__name__,
)
def test_what_is_expected_is_what_is_simulated_while_links_are_not_full(background):
    fleet_, trace = cluster(background), fixed(8000, 200, rate=0.3)
    told = expect(fleet_, trace)
    assert told.load < 0.1 and simulated(fleet_, trace) == pytest.approx(told.gain, abs=0.03)


def test_a_link_narrower_than_a_flow_on_its_tier_bounds_what_is_expected():
    fleet_, trace = cluster(oversubscription=80.0), fixed(8000, 60, rate=0.02)
    assert expect(fleet_, trace).ratio == pytest.approx(6.25e9 / (100e9 / 80))
    assert simulated(fleet_, trace) <= expect(fleet_, trace).gain + 0.03


def test_links_that_will_be_full_are_told_and_there_more_is_gained():
    fleet_, trace = cluster(oversubscription=40.0), fixed(8000, 200, rate=4.0)
    told = expect(fleet_, trace)
    assert "links will be full" in told.verdict and simulated(fleet_, trace) > told.gain + 0.1
    assert "will be full" not in expect(fleet_, trace, rate=0.25).verdict
    pace = 199 / trace.jobs[-1].arrival
    assert told.load == pytest.approx(pace * 8000 * 327_680 * (12 / 16) / 4 / 2.5e9)


def test_all_that_leaves_one_pod_counts_against_its_own_link():
    lonely = cluster(hosts={"prefill": (0,), "decode": (2, 4, 6)}, oversubscription=40.0)
    trace = fixed(8000, 200, rate=0.5)
    pace = 199 / trace.jobs[-1].arrival
    assert expect(lonely, trace).load == pytest.approx(pace * 8000 * 327_680 / 2.5e9)


def test_a_prompt_takes_all_stages_of_a_pipeline():
    def told(stages: int) -> float:
        latency = Pipeline(stages=stages, prefill_token=1e-4, decode_stage=(0.01,))
        groups = tuple(Group(role=role, hosts=PODS[role], latency=latency) for role in PODS)
        return expect(Cluster(instances=groups), fixed(8000, 20)).transfer

    one, four = told(1), told(4)
    assert one / (1 - one) == pytest.approx(4 * four / (1 - four))


def test_traffic_that_takes_too_many_steps_is_refused_before_it_is_drawn():
    walk = RandomWalk(period=1e-3)
    for background in (walk, Windows(base=walk)):
        with pytest.raises(StropError, match=r"steps in .* over the 2e\+08 that are drawn"):
            expect(cluster(background), fixed(100, 20, rate=3e-4))


def test_one_request_is_too_few_to_tune_weights_on():
    asked = Settings(policies=("round-robin", "cache-load", "netkv"), seeds=1)
    with pytest.raises(StropError, match="leave cache-load out of --policy, or give its weights"):
        experiment(cluster(), partial(alike, fixed(100, 1)), asked)
    given = Settings(policies=("round-robin", "cache-load:w_c=1,w_l=1"), seeds=1)
    assert len(experiment(cluster(), partial(alike, fixed(100, 1)), given).runs) == 2


def test_tuning_finds_the_weights_of_the_least_cost_on_jobs_that_are_not_measured():
    trace = Trace("made", [Job(Request(id, 1), 1, float(id)) for id in range(50)])
    seen = []

    def evaluate(method, part):
        seen.extend(job.request.id for job in part.jobs)
        return abs(method.w_l - 0.3)

    tuned = tune(evaluate, trace)
    assert tuned.policy.w_l == pytest.approx(0.3) and tuned.policy.w_c == pytest.approx(0.7)
    assert [method.w_l for method, _ in tuned.rows] == pytest.approx(np.arange(11) / 10)
    assert set(seen) == set(range(10))
    assert [job.request.id for job in tuned.rest.jobs] == list(range(10, 50))


def test_tuning_refuses_a_slice_without_jobs_or_without_a_cost():
    at_once = Trace("made", [Job(Request(id, 1), 1) for id in range(3)])
    with pytest.raises(StropError, match="no request is on one side"):
        tune(lambda method, part: 0.0, at_once)
    trace = Trace("made", [Job(Request(id, 1), 1, float(id)) for id in range(3)])
    with pytest.raises(StropError, match="larger share"):
        tune(lambda method, part: float("nan"), trace, 0.5)
