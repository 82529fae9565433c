"""NetKV: its choice against brute force, the steps of its ablation, its theorems."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing import context, fleet, random_states

from strop.serve.base import Context, Endpoints, Request
from strop.serve.gain import crossover, gap_a_token, survives
from strop.serve.routing.cache_aware import CacheAware
from strop.serve.routing.cache_load import CacheLoad
from strop.serve.routing.netkv import NetKV, NetKVSelf, NetKVStatic

INSTANCES = 5_000


def brute(method, request: Request, e: Endpoints, seen: Context, peer: int) -> int:
    """The formula endpoint by endpoint, in plain numbers."""
    gamma = getattr(method, "gamma", 0.0)
    columns = (e.node, e.free, e.hits(request), e.running, e.waiting, seen.local.sent, e.wait, e.step)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    bandwidth, latency, taken = seen.oracle.bandwidth, seen.oracle.latency, seen.oracle.taken
    anywhere = any(row[1] >= request.prompt for row in rows)
    ranks = []
    for d, (node, free, hit, running, waiting, sent, wait, step) in enumerate(rows):
        if anywhere and free < request.prompt:
            continue
        tier = node % 4
        n_in = seen.local.flows.get((peer, tier), 0)
        c = taken.item(tier) if isinstance(method, NetKV) else 0.0
        s_eff = seen.kv_bytes * max(0, request.prompt - (hit if method.hits else 0))
        t_xfer = s_eff * (1 + gamma * n_in) / (bandwidth.item(tier) * (1 - c)) + latency.item(tier)
        cost = t_xfer + wait + sent * step + step
        ranks.append((cost, tier, running + waiting + sent, d))
    return min(ranks)[-1]


@pytest.mark.parametrize("exact", [True, False])
def test_netkv_picks_what_brute_force_picks_in_10_000_random_states(exact):
    kinds = (NetKVStatic, NetKVSelf, lambda hits: NetKVSelf(hits, 0.5), NetKV, lambda hits: NetKV(hits, 0.0))
    ladder = itertools.cycle([kind(hits) for hits in (True, False) for kind in kinds])
    for (request, endpoints, seen), method in zip(random_states(0, 5_000, exact), ladder, strict=False):
        picked = method.pick(request, endpoints, seen, 7).endpoint
        assert picked == brute(method, request, endpoints, seen, 7), (request.id, method)


def test_each_rung_of_the_ladder_reads_what_the_one_below_does_not():
    request, pair = Request(0, 100), fleet([2, 3])
    seen = context((8, 4, 2, 1), taken=(0, 0, 0.8, 0), flows={(5, 2): 2, (6, 3): 9})
    assert NetKVStatic().scores(request, pair, seen, 5).tolist() == [50, 100]
    assert NetKVSelf().scores(request, pair, seen, 5).tolist() == [150, 100]
    assert NetKVSelf(gamma=0.5).scores(request, pair, seen, 5).tolist() == [100, 100]
    assert NetKV().scores(request, pair, seen, 5) == pytest.approx([750, 100])
    assert NetKV().scores(request, pair, seen, None).tolist() == [0, 0]


def test_without_hits_the_whole_prompt_travels():
    request, pair, seen = Request(0, 100), fleet([3, 3], [0, 60]), context()
    assert NetKV().scores(request, pair, seen, 0).tolist() == [100, 40]
    assert NetKV(hits=False).scores(request, pair, seen, 0).tolist() == [100, 100]


shares = st.floats(0.01, 0.5)


@settings(max_examples=125, deadline=None)
@given(shares, shares, st.floats(1.05, 50), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_t1_a_far_warm_endpoint_loses_without_bound_beyond_the_crossover(hit, delta, margin, kv_bytes, late):
    delta = min(delta, hit)
    far = 1e6
    near = far * margin * (1 - hit + delta) / (1 - hit)
    gap = gap_a_token(kv_bytes, hit, delta, near, far)
    from_here = crossover(kv_bytes, hit, delta, near, far, late)
    assert gap > 0
    seen = context((near, far, far, far), kv_bytes=kv_bytes)
    for factor in (*np.geomspace(0.01, 0.999, 20), *np.geomspace(1.001, 1e9, 20)):
        tokens = factor * from_here
        request = Request(0, tokens)
        pair = fleet([0, 1], [(hit - delta) * tokens, hit * tokens], wait=[late, 0.0])
        decision = NetKVStatic().pick(request, pair, seen, 0)
        assert decision.endpoint == (0 if factor > 1 else 1)
        lost = decision.scores[1] - decision.scores[0]
        assert abs(lost - (gap * tokens - late)) <= 1e-6 * (gap * tokens + late)
        assert CacheAware().pick(request, pair, seen, 0).endpoint == 1


def test_t1_the_gap_a_token_is_the_same_however_long_and_there_may_be_no_crossover():
    assert crossover(1.0, 0.5, 0.25, near=1.5, far=1.0, seconds=1.0) == np.inf
    assert crossover(1.0, 0.5, 0.25, near=1.4, far=1.0) == np.inf
    assert crossover(1.0, 0.5, 0.25, near=3.0, far=1.0, seconds=-1.0) == 0
    assert crossover(1.0, 0.5, 0.25, near=3.0, far=1.0, seconds=1.0) == pytest.approx(4.0)


def stale_states(rng: np.random.Generator):
    """Bandwidths, congestion as reported, what it may be off by, and congestion within that."""
    bandwidth = 10 ** rng.uniform(9, 12, (INSTANCES, 4))
    reported = rng.uniform(0, 0.95, (INSTANCES, 4)) * rng.choice([0.1, 1.0], (INSTANCES, 1))
    eps = rng.uniform(0, 0.3, INSTANCES)
    true = np.clip(reported + eps[:, None] * rng.uniform(-1, 1, (INSTANCES, 4)), 0, 0.95)
    return bandwidth, reported, eps, true


def test_t2_where_the_inequality_holds_stale_telemetry_picks_the_tier_that_is_best():
    held, one_of_each, request = 0, fleet([0, 1, 2, 3]), Request(0, 1000)
    for bandwidth, reported, eps, true in zip(*stale_states(np.random.default_rng(0)), strict=True):
        told, is_so = (context(bandwidth, taken=c) for c in (reported, true))
        a = NetKV().pick(request, one_of_each, told, 0).endpoint
        others = [b for b in range(4) if b != a]
        if all(survives(bandwidth[a], reported[a], bandwidth[b], reported[b], eps) for b in others):
            held += 1
            assert NetKV().pick(request, one_of_each, is_so, 0).endpoint == a
    assert held > INSTANCES / 4


def test_t2_where_the_inequality_fails_some_congestion_within_eps_turns_the_order():
    turned, pair, request = 0, fleet([0, 1]), Request(0, 1000)
    for bandwidth, reported, eps, _ in zip(*stale_states(np.random.default_rng(1)), strict=True):
        a = NetKV().pick(request, pair, context(bandwidth, taken=reported), 0).endpoint
        b = 1 - a
        worst = reported.copy()
        worst[[a, b]] += eps, -eps
        inside = worst[a] <= 0.95 and worst[b] >= 0
        if inside and not survives(bandwidth[a], reported[a], bandwidth[b], reported[b], eps):
            turned += 1
            assert NetKV().pick(request, pair, context(bandwidth, taken=worst), 0).endpoint == b
    assert turned > INSTANCES / 50


@settings(max_examples=100, deadline=None)
@given(st.floats(1e9, 1e12), st.floats(0, 0.95), st.floats(0, 0.3))
def test_t2_at_twice_the_bandwidth_only_a_near_tier_over_half_loaded_is_passed(far, c_far, eps):
    limit = 0.5 + c_far / 2
    assert survives(2 * far, limit - 1.5 * eps - 1e-3, far, c_far, eps)
    assert not survives(2 * far, limit - 1.5 * eps + 1e-3, far, c_far, eps)


def test_t3_on_one_tier_netkv_orders_as_cache_and_load_do():
    rng = np.random.default_rng(3)
    for _ in range(INSTANCES):
        count, prompt = int(rng.integers(2, 12)), int(rng.integers(1, 50_000))
        running = rng.permutation(count * 3)[:count]
        one_tier = fleet(
            np.full(count, 2),
            rng.integers(0, prompt + 1, count),
            running=running,
            wait=running * 0.03125,
            step=np.full(count, 0.0125),
        )
        seen, request = context((1e9,) * 4, kv_bytes=rng.uniform(1e3, 1e6)), Request(0, prompt)
        same = CacheLoad(w_c=prompt * seen.kv_bytes / 1e9, w_l=0.03125 * running.max())
        order = np.argsort(NetKV().scores(request, one_tier, seen, 0), kind="stable")
        assert order.tolist() == np.argsort(same.scores(request, one_tier, seen, 0), kind="stable").tolist()


def test_t4_bandwidths_and_sizes_scaled_alike_change_no_decision_of_an_idle_fleet():
    factors = 10 ** np.random.default_rng(4).uniform(-6, 6, INSTANCES)
    states = random_states(4, INSTANCES, exact=False)
    for (request, endpoints, seen), factor in zip(states, factors, strict=True):
        endpoints.wait, endpoints.step = np.zeros((2, len(endpoints)))
        oracle = replace(seen.oracle, bandwidth=seen.oracle.bandwidth * factor)
        scaled = replace(seen, oracle=oracle, kv_bytes=seen.kv_bytes * factor)
        picks = [NetKV().pick(request, endpoints, each, 7).endpoint for each in (seen, scaled)]
        assert picks[0] == picks[1]


def test_equal_costs_go_to_the_nearer_tier_then_to_fewer_requests_then_to_the_lower_number():
    request, seen = Request(0, 10), context((1, 1, 1, 1))
    assert NetKV().pick(request, fleet([3, 2, 1, 2]), seen, 0).endpoint == 2
    assert NetKV().pick(request, fleet([2, 2, 2, 2], running=[3, 2, 1, 2]), seen, 0).endpoint == 2
    assert NetKV().pick(request, fleet([2, 2, 2, 2], waiting=[3, 2, 1, 1]), seen, 0).endpoint == 2


def test_a_decision_among_256_endpoints_takes_less_than_2_ms():
    rng = np.random.default_rng(6)
    count = 256
    many = fleet(rng.integers(0, 4, count), rng.integers(0, 500, count), step=rng.uniform(0, 1, count))
    seen, request, taken = context(), Request(0, 1000), []
    for _ in range(50):
        start = time.perf_counter()
        NetKV().pick(request, many, seen, 0)
        taken.append(time.perf_counter() - start)
    assert np.median(taken) < 2e-3
