"""The simulated network: fair shares, exact times, and flows that others' traffic slows."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.core.errors import StropError
from strop.kernels import maxmin, maxmin_numba
from strop.serve.background import Constant, RandomWalk, Windows
from strop.serve.events import Clock
from strop.serve.network import FrozenNetwork, Network, Transfers
from strop.serve.oracle import Measured, Telemetry
from strop.serve.topology import LINKS, FatTree, Flat

TREE = FatTree()
both = pytest.mark.parametrize("kernels", [maxmin, maxmin_numba], ids=["twin", "numba"])
every_network = pytest.mark.parametrize("kind", [Network, FrozenNetwork])


@st.composite
def loads(draw):
    """Routes over few links with like or unlike limits, and flows on them; some routes cross no link."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    links, routes, flows = draw(st.integers(1, 8)), draw(st.integers(1, 12)), draw(st.integers(1, 30))
    paths = np.full((routes, LINKS), -1, np.int32)
    for path in paths:
        chosen = rng.permutation(links)[: rng.integers(0, min(links, LINKS) + 1)]
        path[: len(chosen)] = chosen
    spread = draw(st.sampled_from([0.0, 1.0, 3.0]))
    capacity = 1e9 * np.exp(rng.normal(0, spread, links))
    limits = draw(st.sampled_from([1e7, 1e9, 1e11])) * np.exp(rng.normal(0, spread, routes))
    return paths, limits, rng.integers(0, routes, flows), capacity


def shares(kernels, load) -> np.ndarray:
    rates = np.full(len(load[2]), np.nan)
    kernels.fair(*load, rates)
    return rates


@both
@settings(max_examples=200, deadline=None)
@given(load=loads())
def test_every_flow_is_at_its_limit_or_among_the_largest_of_a_full_link(kernels, load):
    paths, limits, flows, capacity = load
    rates = shares(kernels, load)
    assert (rates > 0).all() and (rates <= limits[flows]).all()
    crosses = (paths[flows][:, :, None] == np.arange(len(capacity))).any(1)
    used = rates @ crosses
    assert (used <= capacity * (1 + 1e-12)).all()
    full = used >= capacity * (1 - 1e-12)
    largest = np.where(crosses, rates[:, None], 0).max(0)
    held = crosses & full & (rates[:, None] >= largest * (1 - 1e-12))
    assert ((rates == limits[flows]) | held.any(1)).all()


@settings(max_examples=200, deadline=None)
@given(load=loads(), seconds=st.floats(0, 20))
def test_an_event_is_that_of_the_twin(load, seconds):
    flows = load[2]
    left = np.linspace(1e9, 5e9, len(flows))
    found = []
    for kernels in (maxmin, maxmin_numba):
        state = flows.copy(), left.copy(), shares(maxmin, load), np.zeros(len(flows), np.int64)
        paths, limits, _, capacity = load
        stay, soonest, moved = kernels.advance(paths, limits, capacity, *state, len(flows), seconds)
        found.append((stay, [soonest, moved, *state[1][:stay], *state[2][:stay]], state[0][:stay], state[3]))
    (stay, numbers, routes, ended), other = found
    assert stay == other[0]
    np.testing.assert_allclose(numbers, other[1], rtol=1e-12, atol=1e-3)
    np.testing.assert_array_equal(routes, other[2])
    np.testing.assert_array_equal(ended, other[3])


def run(network: Transfers, sends: list[tuple[float, int, int, float]]) -> list[tuple[int, float]]:
    """Send at times; which arrived when, in order."""
    arrived: list[tuple[int, float]] = []
    clock = network.clock

    def arrive(number: int) -> None:
        arrived.append((number, clock.now))

    for number, (time, source, target, nbytes) in enumerate(sends):
        clock.at(time, network.send, source, target, nbytes, arrive, number)
    clock.run()
    assert len(network) == 0
    assert sorted(number for number, _ in arrived) == list(range(len(sends)))
    return arrived


def times(network: Transfers, sends: list[tuple[float, int, int, float]]) -> list[float]:
    """When each arrived, by number."""
    return [time for _, time in sorted(run(network, sends))]


@every_network
@pytest.mark.parametrize("target, tier", [(0, 0), (1, 1), (2, 2), (4, 3)])
def test_a_flow_alone_takes_its_latency_and_its_bytes_over_the_bandwidth_of_its_tier(kind, target, tier):
    tree = FatTree(nodes=2, pods=2)
    assert tree.tier(0, target) == tier
    (time,) = times(kind(tree, Clock()), [(1.0, 0, target, 5e9)])
    assert time == pytest.approx(1 + tree.latency[tier] + 5e9 / tree.bandwidth[tier], rel=1e-12)


@every_network
def test_no_bytes_take_the_latency(kind):
    assert times(kind(TREE, Clock()), [(1.0, 0, 2, 0.0)]) == [1 + TREE.latency[3]]
    with pytest.raises(ValueError, match="-1 bytes"):
        kind(TREE, Clock()).send(0, 1, -1, print)


def test_two_flows_on_a_link_get_half_each_and_the_longer_one_all_of_it_afterwards():
    lan = Flat(hosts=3, bandwidth=100.0, rtt=0.0)
    assert times(Network(lan, Clock()), [(0, 0, 1, 100), (0, 0, 2, 300)]) == pytest.approx([2, 4])


def test_a_flow_that_comes_later_slows_the_first_from_then_on():
    lan = Flat(hosts=3, bandwidth=100.0, rtt=2.0)
    sends = [(0, 0, 2, 300), (1, 1, 2, 50), (10, 2, 0, 100)]
    assert times(Network(lan, Clock()), sends) == pytest.approx([1 + 3.5, 1 + 2, 1 + 11])


def test_what_a_bottleneck_leaves_goes_to_those_that_can_use_it():
    """Three flows into host 3 get a third each; the fourth shares the way out of host 0 with one of them."""
    lan = Flat(hosts=5, bandwidth=90.0, rtt=0.0)
    sends = [(0, 0, 3, 300), (0, 1, 3, 300), (0, 2, 3, 300), (0, 0, 4, 60)]
    network = Network(lan, Clock())
    assert times(network, sends) == pytest.approx([10, 10, 10, 1])


@every_network
def test_two_hosts_with_a_link_of_their_own_take_it_each_way_and_leave_the_switch_to_others(kind):
    lan = Flat(hosts=3, bandwidth=100.0, rtt=0.0, pairs=((0, 2, 10.0, 4.0), (1, 2, 1000.0, 0.0)))
    sends = [(0, 0, 2, 100), (0, 2, 0, 100), (0, 0, 1, 100), (0, 1, 2, 100), (0, 2, 2, 1e10)]
    assert times(kind(lan, Clock()), sends) == pytest.approx([12, 12, 1, 0.1, 1])
    assert times(Network(lan, Clock()), [(0, 0, 2, 100)] * 2) == pytest.approx([22, 22])
    half = Network(lan, Clock(), Constant(0.5))
    assert times(half, [(0, 0, 2, 100), (0, 0, 1, 100)]) == pytest.approx([22, 2])


@pytest.mark.parametrize(
    "pair",
    [
        (0, 3, 1.0, 0.0),
        (0, 0.5, 1.0, 0.0),
        (1, 1, 1.0, 0.0),
        (0, 1, 1.0),
        (0, 1, 1, 0, 0),
        (),
        ([0], 1, 1.0, 0.0),
    ],
)
def test_a_pair_that_makes_no_sense_is_refused(pair):
    with pytest.raises(StropError, match="each of pairs is two of the 3 hosts"):
        Flat(hosts=3, pairs=(pair,))
    with pytest.raises(StropError, match="pairs is a list of links, got 5"):
        Flat(hosts=3, pairs=5)


def test_frozen_shares_stay_as_they_were_found():
    lan = Flat(hosts=3, bandwidth=100.0, rtt=0.0)
    sends = [(0, 0, 1, 200), (1, 0, 2, 200), (9, 0, 1, 100)]
    assert times(FrozenNetwork(lan, Clock()), sends) == pytest.approx([2, 5, 10])
    assert times(Network(lan, Clock()), sends) == pytest.approx([3, 4, 10])


@pytest.mark.parametrize("tier", [2, 3])
def test_as_many_flows_as_fill_the_nics_of_a_pod_get_the_bandwidth_of_their_tier_and_more_share(tier):
    fill = round(TREE.racks * TREE.nodes * TREE.nic / TREE.bandwidth[1])
    for count, rate in ((fill, TREE.bandwidth[tier]), (2 * fill, TREE.bandwidth[tier] / 2)):
        others = [1 - k % 2 if tier == 2 else 2 + k % 6 for k in range(count)]
        found = times(Network(TREE, Clock()), [(0, k % 2, other, 1e9) for k, other in enumerate(others)])
        assert found == pytest.approx([TREE.latency[tier] + 1e9 / rate] * count)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_byte_is_lost_whatever_happens_and_the_same_happens_again(seed):
    rng = np.random.default_rng(seed)
    tree = FatTree(pods=2, racks=2, nodes=2, nic=20e9)
    backgrounds = Constant(0.3), RandomWalk(seed=3, high=0.9, step=0.3), Windows(length=0.3, every=0.5)
    background = backgrounds[seed % 3]
    starts = np.sort(np.round(rng.uniform(0, 2, 80), 1))
    ends = rng.integers(0, tree.hosts, (80, 2))
    sizes = rng.choice([0, 1, 1e6, 3e9], 80) * rng.choice([1, rng.uniform()], 80)
    sends = [(float(t), int(a), int(b), float(n)) for t, (a, b), n in zip(starts, ends, sizes, strict=True)]
    found = []
    for _ in range(2):
        network = Network(tree, Clock(), background)
        for time in np.linspace(0, 3, 40):
            network.clock.at(float(time), network.check)
        found.append(run(network, sends))
        network.check()
        assert network.asked == pytest.approx(sizes.sum()) and network.ended == pytest.approx(sizes.sum())
    assert found[0] == found[1]


def test_more_flows_and_routes_than_there_was_room_for():
    tree = FatTree(pods=2, racks=4, nodes=4)
    pairs = [(a, b) for a in range(tree.hosts) for b in range(tree.hosts) if a != b][:300]
    network = Network(tree, Clock(), RandomWalk())
    run(network, [(0.01 * k, a, b, 2e9) for k, (a, b) in enumerate(pairs)])
    network.check()
    assert network.ended == pytest.approx(300 * 2e9)


def test_check_finds_what_is_wrong():
    network = Network(TREE, Clock())
    for k in range(16):
        network.send(k % 2, 2 + k % 6, 1e9, print)
    network.check()
    fair = network._rates[:16].copy()
    network._rates[:16] = 2 * fair
    with pytest.raises(AssertionError, match="a link is above"):
        network.check()
    network._rates[0] *= 2
    with pytest.raises(AssertionError, match="a flow is above"):
        network.check()
    network._rates[:16] = fair
    network._left[0] -= 1e3
    with pytest.raises(AssertionError, match="bytes were lost"):
        network.check()


def test_others_traffic_makes_no_events_while_nothing_is_sent():
    network = Network(TREE, Clock(), RandomWalk())
    run(network, [(0.0, 0, 2, 3e9), (500.0, 0, 2, 3e9)])
    assert network.clock.now < 502
    assert network.clock.events < 40


def test_a_flow_that_ends_with_a_change_of_others_traffic_ends_once():
    tree = FatTree(latency=(0.0,) * 4, bandwidth=(400.0, 100.0, 50.0, 25.0), nic=1000.0)
    crowded = Windows(share=0.8, length=2.0, every=4.0, base=Constant(0.0))
    assert times(Network(tree, Clock(), crowded), [(0.0, 0, 2, 10.0), (2.0, 0, 4, 5.0)]) == pytest.approx(
        [2, 2.2]
    )


def test_others_traffic_slows_flows_from_when_it_comes_until_it_goes():
    tree = FatTree(latency=(0.0,) * 4, bandwidth=(400.0, 100.0, 50.0, 25.0), nic=1000.0)
    crowded = Windows(share=0.8, tier=3, length=2.0, every=8.0, base=Constant(0.0))
    sends = [(1.0, 0, 2, 50.0), (1.0, 4, 6, 50.0), (1.0, 0, 1, 50.0)]
    assert times(Network(tree, Clock(), crowded), sends) == pytest.approx([3.8, 3.0, 2.0])
    assert times(Network(tree, Clock(), crowded), [(8.0, 0, 2, 50.0)]) == pytest.approx([8 + 2 + 1.6])
    assert times(Network(tree, Clock(), crowded), [(7.0, 0, 2, 50.0)]) == pytest.approx([7 + 1 + 2 + 0.6])


def test_others_take_their_part_of_links_and_not_of_hosts():
    tree = FatTree(latency=(0.0,) * 4, bandwidth=(400.0, 100.0, 50.0, 25.0), nic=100.0, oversubscription=8.0)
    half = Constant(0.5)
    assert times(Network(tree, Clock(), half), [(0, 0, 0, 400)]) == pytest.approx([1.0])
    assert times(Network(tree, Clock(), half), [(0, 0, 2, 25), (0, 1, 4, 25)]) == pytest.approx([4.0, 4.0])


def test_tiers_and_paths_of_a_fat_tree():
    tree = FatTree(pods=2, racks=2, nodes=2)
    tiers = tree.tier(np.arange(8)[:, None], np.arange(8))
    assert tiers[0].tolist() == [0, 1, 2, 2, 3, 3, 3, 3]
    np.testing.assert_array_equal(tiers, tiers.T)
    assert tree.path(0, 0) == ()
    assert tree.path(0, 1) == (0, 9)
    assert tree.path(0, 3) == (0, 16, 11)
    assert tree.path(0, 4) == (0, 18, 21, 12)
    assert tree.path(4, 0) == (4, 19, 20, 8)
    capacity, places = tree.links()
    assert capacity.tolist() == [50e9] * 16 + [100e9] * 2 + [50e9] * 4
    assert places[16:].tolist() == [[2, 0], [2, 1], [3, 0], [3, 1], [3, 0], [3, 1]] and not places[:16].any()


@every_network
def test_a_host_that_is_not_there_is_refused(kind):
    with pytest.raises(StropError, match="host 8 is not in a network of 8"):
        kind(TREE, Clock()).send(0, 8, 1.0, print)
    with pytest.raises(StropError, match="host -1"):
        kind(Flat(), Clock()).send(-1, 0, 1.0, print)


@pytest.mark.parametrize(
    "name, make",
    [
        ("pods", lambda: FatTree(pods=0)),
        ("racks", lambda: FatTree(racks=-1)),
        ("nodes", lambda: FatTree(nodes=1.5)),
        ("bandwidth", lambda: FatTree(bandwidth=(1e9, 1e9, 0.0, 1e9))),
        ("bandwidth", lambda: FatTree(bandwidth=(1e9, -1e9, 1e9, 1e9))),
        ("bandwidth", lambda: FatTree(bandwidth=(1e9, 1e9, 1e9))),
        ("bandwidth", lambda: FatTree(bandwidth=1e9)),
        ("latency", lambda: FatTree(latency=(0.0, 0.0, 0.0, -1.0))),
        ("nic", lambda: FatTree(nic=float("nan"))),
        ("oversubscription", lambda: FatTree(oversubscription=0)),
        ("hosts", lambda: Flat(hosts=True)),
        ("bandwidth", lambda: Flat(bandwidth=0)),
        ("rtt", lambda: Flat(rtt=-1e-3)),
        ("bandwidth of a pair", lambda: Flat(pairs=((0, 1, 0.0, 0.0),))),
        ("rtt of a pair", lambda: Flat(pairs=((0, 1, 1.0, float("nan")),))),
        ("memory", lambda: Flat(memory="fast")),
        ("share", lambda: Constant(1.0)),
        ("share", lambda: Windows(share=-0.1)),
        ("low", lambda: RandomWalk(low=0.5)),
        ("high", lambda: RandomWalk(high=0.99)),
        ("step", lambda: RandomWalk(step=0)),
        ("period", lambda: RandomWalk(period=0)),
        ("period", lambda: RandomWalk(period=1e-4)),
        ("every", lambda: Windows(length=1.0, every=1e-4)),
        ("length", lambda: Windows(length=1e-4)),
        ("bandwidth", lambda: Flat(bandwidth=1e-300)),
        ("bandwidth", lambda: Flat(bandwidth=1e300)),
        ("bandwidth", lambda: Flat(bandwidth=10**400)),
        ("tier", lambda: Windows(tier=4)),
        ("tier", lambda: Windows(tier=0)),
        ("length", lambda: Windows(length=100.0, every=60.0)),
        ("refresh", lambda: Telemetry(TREE, Constant().traffic(4), refresh=0)),
        ("refresh", lambda: Telemetry(TREE, Constant().traffic(4), refresh=1e-4)),
        ("max_age", lambda: Telemetry(TREE, Constant().traffic(4), max_age=float("inf"))),
        ("weight", lambda: Measured(TREE, weight=1.5)),
    ],
)
def test_fields_that_make_no_sense_are_refused_by_name(name, make):
    with pytest.raises(StropError, match=rf"\b{name} must be"):
        make()


def test_no_tensor_library_is_imported():
    imports = "from strop.serve import topology, network, background, oracle"
    code = f"import sys; {imports}; network.maxmin.kernels(); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
