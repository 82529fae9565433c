"""Routing policies: room, turns, stale reports, weights, and the names that give them."""

import copy
import itertools
import subprocess
import sys

import numpy as np
import pytest
from routing import context, fleet, random_states

from strop.core.errors import StropError
from strop.serve.base import Request
from strop.serve.routing import POLICIES, policy
from strop.serve.routing.cache_aware import CacheAware
from strop.serve.routing.cache_load import CacheLoad
from strop.serve.routing.least_loaded import LeastLoaded
from strop.serve.routing.netkv import NetKV
from strop.serve.routing.power_of_two import PowerOfTwo
from strop.serve.routing.round_robin import RoundRobin
from strop.serve.routing.topology import Topology

every = pytest.mark.parametrize("name", POLICIES)


@every
def test_the_next_best_takes_what_the_best_has_no_room_for(name):
    request = Request(0, 100)
    warm = {"hits": [90, 80, 0, 0], "running": [0, 1, 8, 9]}
    empty, some, full = [1e6] * 4, [99, 100, 99, 100], [0] * 4
    seen, picks = context(rng=np.random.default_rng(0)), []
    for free in (empty, some, full):
        state = copy.deepcopy(seen)
        picks.append(POLICIES[name]().pick(request, fleet(range(4), **warm, free=free), state, 0).endpoint)
    assert picks[1] in (1, 3)
    assert picks[2] == picks[0]
    if name != "power-of-two":
        assert picks == [0, 1, 0]


@every
def test_a_policy_changes_nothing_that_it_is_given_but_the_generator(name):
    for request, endpoints, seen in random_states(5, 100, exact=True):
        seen.rng = np.random.default_rng(0)
        columns = [value for value in vars(endpoints).values() if isinstance(value, np.ndarray)]
        memory = [seen.local.sent, seen.oracle.bandwidth, seen.oracle.latency, seen.oracle.taken]
        for array in (*columns, *memory, endpoints.hits(request)):
            array.flags.writeable = False
        flows, generator = dict(seen.local.flows), copy.deepcopy(np.random.get_state()[1])
        first = POLICIES[name]().pick(request, endpoints, copy.deepcopy(seen), 7)
        assert first.endpoint == POLICIES[name]().pick(request, endpoints, seen, 7).endpoint
        assert seen.local.flows == flows and seen.local.picked == 0
        assert (np.random.get_state()[1] == generator).all()
        assert first.scores.shape == (len(endpoints),) and not np.isnan(first.scores).any()


def rounds(method, request, endpoints, seen, turns: int) -> list[int]:
    """Endpoints picked one after another while the report stays the same."""
    picked, seen.local.sent = [], np.zeros(len(endpoints), dtype=np.int64)
    for _ in range(turns):
        picked.append(method.pick(request, endpoints, seen, 0).endpoint)
        seen.local.picked += 1
        seen.local.sent[picked[-1]] += 1
    return picked


def test_round_robin_takes_turns_among_those_with_room():
    request = Request(0, 10)
    busy, some = fleet([0] * 3, running=[9, 0, 5]), fleet([3, 2, 1, 0, 0], free=[9, 10, 0, 11, 12])
    assert rounds(RoundRobin(), request, busy, context(), 7) == [0, 1, 2, 0, 1, 2, 0]
    assert rounds(RoundRobin(), request, some, context(), 6) == [1, 3, 4, 1, 3, 4]


@pytest.mark.parametrize("method", [LeastLoaded(), CacheLoad(), Topology(), NetKV()])
def test_what_was_sent_keeps_a_stale_report_from_herding(method):
    request = Request(0, 10)
    stale = fleet([1] * 4, running=[0, 1, 1, 1], step=[0.5] * 4)
    picked = rounds(method, request, stale, context(), 40)
    assert max(np.bincount(picked, minlength=4)) <= 11


def test_what_was_sent_since_the_report_adds_to_what_is_in_it():
    trio = fleet([0] * 3, running=[1, 1, 1], waiting=[4, 0, 4], step=[0.5] * 3, wait=[2, 0, 2])
    seen = context(sent=[0, 4, 2])
    assert LeastLoaded().scores(Request(0, 1), trio, seen, None).tolist() == [5, 5, 7]
    assert NetKV().scores(Request(0, 1), trio, seen, None).tolist() == [2.5, 2.5, 3.5]


def test_power_of_two_takes_the_less_loaded_of_a_pair_that_its_generator_draws():
    six, seen, pairs = fleet([0] * 6, running=range(6)), context(rng=np.random.default_rng(0)), set()
    for _ in range(400):
        decision = PowerOfTwo().pick(Request(0, 1), six, seen, 0)
        drawn = np.flatnonzero(np.isfinite(decision.scores))
        assert len(drawn) == 2 and decision.endpoint == drawn[0]
        pairs.add(tuple(drawn))
    assert pairs == set(itertools.combinations(range(6), 2))
    assert PowerOfTwo().pick(Request(0, 1), fleet([0]), seen, 0).endpoint == 0


def test_cache_aware_goes_by_load_where_hits_tie_match_little_or_load_is_skewed():
    request, seen = Request(0, 100), context()
    warm = fleet([0, 1, 2], [20, 50, 50], running=[0, 80, 79])
    assert CacheAware().pick(request, warm, seen, 0).endpoint == 2
    assert CacheAware(cache_threshold=0.5).pick(request, warm, seen, 0).endpoint == 0
    assert CacheAware(0.3, 64, 1.5).pick(request, warm, seen, 0).endpoint == 0
    assert CacheAware(0.3, 80, 1.5).pick(request, warm, seen, 0).endpoint == 2
    cold = fleet([0, 1, 2], running=[3, 2, 1])
    assert CacheAware().pick(request, cold, seen, 0).endpoint == 2


def test_cache_load_and_topology_add_weighted_shares():
    request, seen = Request(0, 100), context()
    three = fleet([0, 1, 3], [20, 50, 0], running=[1, 2, 4])
    assert CacheLoad(2, 1).scores(request, three, seen, 0) == pytest.approx([1.85, 1.5, 3.0])
    assert Topology(2, 1).scores(request, three, seen, 0) == pytest.approx([0.25, 2.1, 2.96])
    assert Topology(2, 1).scores(request, three, seen, None) == pytest.approx([2.25, 2.5, 3.0])


@every
def test_a_name_alone_gives_the_policy_as_it_is_set_by_default(name):
    assert policy(name) == POLICIES[name]()


def test_fields_follow_the_name():
    assert policy("netkv:gamma=0.5,hits=false") == NetKV(hits=False, gamma=0.5)
    assert policy("cache-load:w_c=0") == CacheLoad(w_c=0.0)
    assert policy("cache-aware:balance_abs_threshold=64") == CacheAware(balance_abs_threshold=64.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("netvk", "did you mean 'netkv'"),
        ("", "unknown routing policy ''"),
        ("netkv:gama=1", "no field 'gama'; did you mean 'gamma'"),
        ("netkv-static:gamma=1", "no field 'gamma'"),
        ("round-robin:x=1", "no field 'x'"),
        ("netkv:", "field=value after the colon, got ''"),
        ("netkv:gamma", "field=value after the colon, got 'gamma'"),
        ("netkv:gamma=1,gamma=2", "gamma twice"),
        ("netkv:gamma=high", "must be a number, got 'high'"),
        ("netkv:hits=1", "must be true or false, got '1'"),
        ("netkv:gamma=-1", "gamma must be finite and at least 0"),
        ("netkv:gamma=nan", "gamma must be finite and at least 0"),
        ("cache-load:w_c=0,w_l=0", "one above 0"),
        ("topology:w_t=inf", "weights must be finite"),
        ("cache-aware:cache_threshold=2", "from 0 to 1"),
        ("cache-aware:balance_rel_threshold=nan", "balance_rel_threshold at least 1"),
    ],
)
def test_a_name_or_field_that_is_none_is_answered_with_what_is_known(text, message):
    with pytest.raises(StropError, match=message):
        policy(text)


def test_routing_needs_no_tensor_library():
    imports = "import sys, strop.serve.routing, strop.serve.gain, strop.serve.tuning"
    subprocess.run([sys.executable, "-c", f"{imports}; sys.exit('torch' in sys.modules)"], check=True)
