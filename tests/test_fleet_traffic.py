"""Others' traffic over time, and what oracles are told of the network."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.serve.background import BLOCK, KEPT, MOST, Constant, RandomWalk, Windows, period_of
from strop.serve.events import Clock
from strop.serve.network import Network
from strop.serve.oracle import Measured, Static, Telemetry
from strop.serve.topology import FatTree, Flat

TREE = FatTree()


def test_a_walk_is_keyed_stays_between_its_ends_and_covers_them():
    walk = RandomWalk(low=0.1, high=0.5, step=0.05, seed=7)
    one, other = walk.traffic(3), walk.traffic(3)
    late = other(10_000.0)[0].copy()
    steps = np.stack([one(walk.period * k)[0] for k in range(40_001)])
    np.testing.assert_array_equal(steps[-1], late)
    np.testing.assert_array_equal(walk.traffic(5)(300.0)[0][:, :3], one(300.0)[0])
    assert (RandomWalk(low=0.1, high=0.5, step=0.05, seed=8).traffic(3)(0.0)[0] != one(0.0)[0])[1:].all()
    walked = steps[:, 1:].reshape(len(steps), -1)
    assert (steps[:, 0] == 0).all() and walked.min() >= 0.1 and walked.max() <= 0.5
    assert np.histogram(walked, 4, (0.1, 0.5))[0].min() > 0.2 * walked.size
    jumps = np.diff(walked, axis=0)
    assert jumps.std() == pytest.approx(0.05, rel=0.1)
    assert abs(jumps[BLOCK - 1]).max() < 6 * 0.05
    assert abs(np.corrcoef(jumps.T) - np.eye(9)).max() < 0.05


def test_a_long_walk_takes_the_memory_of_its_newest_blocks():
    traffic = RandomWalk().traffic(2)
    block = RandomWalk().period * BLOCK
    first = traffic(0.0)[0].copy()
    tracemalloc.start()
    last = traffic(60 * block)[0].copy()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 2 * KEPT * BLOCK * 4 * 2 * 8
    assert (traffic(0.0)[0] == first).all() and (traffic(60 * block)[0] == last).all()


def test_telemetry_does_not_look_at_what_it_would_not_believe():
    looked = []

    def traffic(time: float):
        looked.append(time)
        return np.full((4, 4), 0.5), np.inf

    oracle = Telemetry(TREE, traffic, refresh=1000.0, max_age=120.0)
    assert not oracle.congestion(1900.0).any() and looked == [0.0]
    assert oracle.congestion(2100.0).any() and looked == [0.0, 2000.0]


def test_windows_crowd_one_pod_after_another_and_leave_the_rest_to_the_base():
    traffic = Windows(share=0.8, tier=3, length=60.0, every=90.0, base=Constant(0.2)).traffic(2)
    for time, pod, until in ((0.0, 0, 60.0), (59.9, 0, 60.0), (90.0, 1, 150.0), (200.0, 0, 240.0)):
        shares, end = traffic(time)
        assert end == until
        assert shares[3].tolist() == [0.8 if each == pod else 0.2 for each in range(2)]
        assert shares[1:3].tolist() == [[0.2, 0.2]] * 2
    shares, end = traffic(60.0)
    assert end == 90.0 and shares[3].tolist() == [0.2, 0.2]


@given(number=st.integers(0, 10**6), length=st.floats(1e-3, 1e3))
def test_the_next_period_is_always_later(number, length):
    time = number * length
    found, until = period_of(time, length)
    assert until > time and abs(found - number) <= 1
    assert period_of(until, length)[1] > until


def test_a_static_oracle_knows_tiers_alone():
    oracle = Static(TREE)
    assert oracle.bandwidth.tolist() == list(TREE.bandwidth) and oracle.latency.tolist() == list(TREE.latency)
    assert oracle.tier(2, np.array([2, 2, 3, 7])).tolist() == [0, 0, 2, 3]
    assert oracle.congestion(5.0).tolist() == [0, 0, 0, 0]


def test_oracles_know_links_of_pairs():
    lan = Flat(hosts=3, bandwidth=100.0, rtt=2.0, pairs=((2, 0, 10.0, 4.0),))
    bandwidth, latency = Static(lan).way(0, np.array([0, 1, 2, 2]))
    assert bandwidth.tolist() == [lan.memory, 100, 10, 10] and latency.tolist() == [0, 1, 2, 2]
    measured = Measured(lan)
    measured.observe(0, 2, 100, 2 + 20, now=1.0)
    assert measured.congestion(1.0) == pytest.approx([0, 0.5, 0, 0])


def test_telemetry_sees_what_was_when_it_last_looked():
    crowded = Windows(share=0.8, tier=3, length=60.0, every=120.0, base=Constant(0.2))
    network = Network(TREE, Clock(), crowded)
    oracle = Telemetry(TREE, network.traffic, refresh=50.0)
    busy, quiet = [0, 0.2, 0.2, 0.35], [0, 0.2, 0.2, 0.2]
    seen = [(49.0, busy, 0), (99.0, busy, 50), (101.0, quiet, 100), (149.0, quiet, 100), (150.0, busy, 150)]
    for now, shares, measured_at in seen:
        assert oracle.congestion(now) == pytest.approx(shares)
        assert oracle.measured_at == measured_at


def test_a_measurement_that_is_too_old_counts_as_none():
    oracle = Telemetry(TREE, Constant(0.4).traffic(4), refresh=300.0, max_age=120.0)
    for now, believed in ((0.0, True), (120.0, True), (120.1, False), (299.0, False), (300.0, True)):
        assert oracle.congestion(now).any() == believed


def test_telemetry_never_says_that_nothing_is_left():
    oracle = Telemetry(TREE, lambda time: (np.ones((4, 4)), np.inf))
    assert oracle.congestion(0.0).tolist() == [MOST] * 4


def test_what_transfers_did_not_get_is_congestion_until_it_is_too_old():
    oracle = Measured(TREE, weight=0.5, max_age=10.0)
    assert oracle.congestion(0.0).tolist() == [0, 0, 0, 0]
    half, idle = 1e9 / (TREE.bandwidth[3] / 2), 1e9 / TREE.bandwidth[3]
    oracle.observe(0, 2, 1e9, half + TREE.latency[3], now=1.0)
    assert oracle.congestion(1.0) == pytest.approx([0, 0, 0, 0.5])
    oracle.observe(0, 4, 1e9, idle + TREE.latency[3], now=2.0)
    assert oracle.congestion(2.0) == pytest.approx([0, 0, 0, 0.25])
    oracle.observe(0, 4, 0.0, TREE.latency[3], now=11.0)
    assert oracle.congestion(12.0)[3] == pytest.approx(0.25) and oracle.congestion(12.1)[3] == 0
    oracle.observe(0, 2, 1e9, 100 * idle, now=20.0)
    assert oracle.congestion(20.0)[3] == MOST


def test_measured_transfers_tell_what_others_take_where_flows_are_alone():
    network = Network(TREE, Clock(), Constant(0.3))
    oracle = Measured(TREE)

    def seen(start: float, target: int) -> None:
        oracle.observe(0, target, 2e9, network.clock.now - start, network.clock.now)

    for k in range(10):
        start, target = 5.0 * k, 1 + k % 2
        network.clock.at(start, network.send, 0, target, 2e9, seen, start, target)
    network.clock.run()
    assert oracle.congestion(50.0) == pytest.approx([0, 0, 0.3, 0.3])
