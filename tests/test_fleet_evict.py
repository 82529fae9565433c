"""Evictors: AsymCache against brute force, the shape of f, LRU as a special case, chunks and pinning."""

import math
import random
import time

import numpy as np
import pytest

from strop.core.blocks import KVStore
from strop.core.chunks import Fixed, Shrinking
from strop.core.errors import StropError
from strop.core.evict import EVICTORS, Surroundings
from strop.core.evict.asymcache import EVERY, AsymCache
from strop.core.evict.ghost import Ghost
from strop.core.evict.lru import LRU
from strop.core.evict.worth import RecomputeCost, Reuse
from strop.serve.base import Job, Request, Trace
from strop.serve.cache_replay import arrivals, replay
from strop.serve.pinning import ENOUGH, ContinuumTTL

COST = RecomputeCost.of(0.216e-3, 7.1e-9, 512)
FLAT = RecomputeCost(1.0, 0.0)


@pytest.mark.parametrize(("seed", "log_lambda"), [(0, 0.0), (1, 3.0), (2, -3.0)])
def test_the_two_heap_victim_is_the_least_of_all_blocks(seed, log_lambda):
    rng, reuse = random.Random(seed), Reuse(L=20.0, p=0.6, R=10)
    evictor = AsymCache(COST, reuse, adapt=False)
    evictor.log_lambda = log_lambda
    free: dict[int, tuple[float, int]] = {}
    now = 0.0
    for _ in range(7000):
        now += rng.expovariate(1.0)
        kind, block = rng.randrange(3), rng.randrange(100)
        if kind == 0 and free:
            freed, index = np.array(list(free.values())).T
            worth = reuse.log_f(now - freed, log_lambda) + np.log(COST.a + COST.b * index)
            victim = evictor.victim(now)
            assert abs(worth[list(free).index(victim)] - worth.min()) < 1e-9
            del free[victim]
        elif kind == 1 and block in free:
            evictor.on_hit(block, now)
            del free[block]
        elif block not in free:
            free[block] = now, rng.randrange(200)
            evictor.on_ref_zero(block, free[block][1], now)
        assert len(evictor) == len(free)


def requests(number: int, seed: int = 0, sessions: int = 12, turn: int = 6) -> Trace:
    """Sessions that take turns at random, a few blocks longer every time; every other time two at once."""
    rng = np.random.default_rng(seed)
    said, jobs = [0] * sessions, []
    for id in range(number):
        session = int(rng.integers(sessions))
        said[session] = said[session] + turn if said[session] < 60 else turn
        blocks = tuple(1 + session * 1000 + place for place in range(said[session]))
        jobs.append(Job(Request(id, 512 * len(blocks), (0, *blocks), session), 1, arrival=10.0 * (id // 2)))
    return Trace("sessions", jobs)


class Watched(KVStore):
    """A store that keeps the victims, in order."""

    def __init__(self, capacity, evictor):
        super().__init__(capacity, evictor)
        self.victims, evict = [], self._idle.evict

        def watch(count, now):
            victims = evict(count, now)
            self.victims += victims
            return victims

        self._idle.evict = watch


@pytest.mark.parametrize("adapt", [False, True])
def test_an_equal_cost_everywhere_gives_the_victims_of_lru(adapt):
    stores = [Watched(100, LRU()), Watched(100, AsymCache(FLAT, Reuse(50.0, 0.7), adapt))]
    for store in stores:
        replay(requests(400), store, FLAT)
    assert len(stores[0].victims) > 2 * EVERY
    assert stores[0].victims == stores[1].victims


def test_what_a_block_costs_changes_the_victims():
    stores = [Watched(100, LRU()), Watched(100, AsymCache(COST, Reuse(500.0, 0.9)))]
    for store in stores:
        replay(requests(400), store, COST)
    assert stores[0].victims != stores[1].victims


@pytest.mark.parametrize(("L", "p", "R"), [(30.0, 0.5, 40.0), (1155.0, 0.99, 10.0), (0.2, 0.1, 1.0)])
def test_f_turns_at_the_lifespan_and_falls_as_much_steeper_as_asked(L, p, R):
    reuse, step = Reuse(L, p, R), L / 100
    before, at, after = np.log(reuse.f(np.array([L - step, L, L + step])))
    assert reuse.f(0.0) == 1
    assert reuse.f(L) == pytest.approx(p, rel=1e-9)
    assert (at - after) / (before - at) == pytest.approx(R, rel=1e-9)
    assert -reuse.alpha * math.log(p) == pytest.approx(L, rel=1e-9)
    assert reuse.f(L * (1 + 1e-12)) == pytest.approx(reuse.f(L * (1 - 1e-12)), abs=1e-9)


def test_lambda_moves_the_crossing_to_the_mean_lifespan():
    evictor = AsymCache(COST, Reuse(100.0, 0.5))
    for block in range(EVERY):
        evictor.on_ref_zero(block, block, 0.0)
    for block in range(EVERY):
        evictor.on_hit(block, 30.0 + block % 2)
        evictor.on_ref_zero(block, block, 40.0)
    assert evictor.log_lambda == 0
    for _ in range(EVERY):
        evictor.victim(50.0)
    assert evictor.lifespan == pytest.approx(30.5, rel=1e-9)
    flat, steep = -30.5 / evictor.reuse.alpha, (evictor.reuse.tau0 - 30.5) / evictor.reuse.beta
    assert flat == pytest.approx(evictor.log_lambda + steep, abs=1e-9)


def test_keys_count_from_a_later_epoch_before_they_lose_digits():
    places = np.random.default_rng(0).integers(200, size=500).tolist()
    orders = []
    for start in (0.0, 2.0**40):
        evictor = AsymCache(COST, Reuse(L=0.05, p=0.5), adapt=False)
        for block, place in enumerate(places):
            evictor.on_ref_zero(block, place, start + block / 1024)
        orders.append([evictor.victim(start + 1.0) for _ in places])
    assert orders[0] == orders[1] != list(range(500))


def test_a_tool_call_keeps_blocks_that_would_have_gone():
    evictor = AsymCache(FLAT, Reuse(100.0, 0.5), adapt=False)
    evictor.on_tool_call([1], 0.0)
    evictor.on_ref_zero(1, 0, 0.0)
    evictor.on_ref_zero(2, 0, 1.0)
    assert [evictor.victim(2.0), evictor.victim(2.0)] == [2, 1]


def test_tuning_sets_the_lifespan_and_forgets_no_block():
    evictor = AsymCache(COST, Reuse(1.0))
    for block in range(10):
        evictor.on_ref_zero(block, block, float(block))
    evictor.tune(np.arange(101.0), 10.0)
    lifespan = evictor.reuse.L
    assert lifespan == pytest.approx(99.0)
    assert sorted(evictor.victim(20.0) for _ in range(10)) == list(range(10))


@pytest.mark.parametrize("name", EVICTORS)
def test_an_evictor_gives_back_each_free_block_once_and_then_refuses(name):
    future = [(float(block), [block]) for block in range(40)]
    evictor = EVICTORS[name](Surroundings(16, COST, Reuse(10.0), future))
    for block in range(30):
        evictor.on_ref_zero(block, block % 7, float(block))
    for block in range(0, 30, 3):
        evictor.on_hit(block, 30.0)
    assert len(evictor) == 20
    assert {evictor.victim(31.0) for _ in range(20)} == {block for block in range(30) if block % 3}
    with pytest.raises(IndexError):
        evictor.victim(31.0)


def test_max_score_evicts_like_lru_and_pensieve_weighs_cost_by_age():
    around = Surroundings(16, COST, Reuse(10.0))
    oldest = EVICTORS["max-score"](around)
    weighed = EVICTORS["pensieve"](around)
    for block, (index, freed) in enumerate(((0, 5.0), (0, 1.0), (300, 0.0))):
        for evictor in (oldest, weighed):
            evictor.on_ref_zero(block, index, freed)
    assert [oldest.victim(1e4) for _ in range(3)] == [2, 1, 0]
    assert [weighed.victim(10.0) for _ in range(3)] == [1, 0, 2]


def test_the_oracle_evicts_what_never_comes_again_then_the_farthest():
    uses = [(0.0, [1, 2, 3, 4]), (10.0, [1]), (30.0, [2]), (20.0, [3])]
    evictor = EVICTORS["belady"](Surroundings(16, FLAT, Reuse(10.0), uses))
    for block in (1, 2, 3, 4):
        evictor.on_ref_zero(block, 0, 0.0)
    assert [evictor.victim(1.0) for _ in range(4)] == [4, 2, 3, 1]


def test_the_oracle_recomputes_least_and_needs_the_future():
    trace = requests(120)
    around = Surroundings(150, COST, Reuse(200.0), list(arrivals(trace)))
    stores = {name: KVStore(150, make(around)) for name, make in EVICTORS.items()}
    seconds = {name: replay(trace, store, COST).seconds for name, store in stores.items()}
    assert seconds["belady"] == min(seconds.values()) < seconds["lru"]
    with pytest.raises(StropError, match="give it the trace"):
        EVICTORS["belady"](Surroundings(150, COST, Reuse(200.0)))


def test_ghosts_follow_the_setting_that_suits_cyclic_reuse_and_lru_where_the_past_is_dead():
    cycle = [tuple(range(100 * turn, 100 * turn + 40)) for turn in range(4)] * 20
    dead = [(*range(5), *range(1000 * n, 1000 * n + 25)) for n in range(1, 121)]
    for sequences, better in ((cycle, True), (dead, False)):
        jobs = [Job(Request(n, 512 * len(s), s), 1, arrival=10.0 * n) for n, s in enumerate(sequences)]
        trace, ghost = Trace("made", jobs), Ghost(100, COST)
        plain = replay(trace, KVStore(100, LRU()), COST).seconds
        chosen = replay(trace, KVStore(100, ghost), COST).seconds
        assert (ghost.setting is not None) == better
        assert chosen < 0.8 * plain if better else chosen <= 1.02 * plain


def test_evicting_hardly_slows_with_the_number_of_blocks():
    def evictor(blocks):
        made = AsymCache(COST, Reuse(1e3))
        for block in range(blocks):
            made.on_ref_zero(block, block % 200, block * 1e-3)
        return made

    made = {blocks: evictor(blocks) for blocks in (8_000, 128_000)}
    ratios = []
    for turn in range(5):
        took = {}
        for blocks, one in made.items():
            start = time.process_time()
            for block in range(1000):
                now = 200.0 + turn + block * 1e-4
                one.victim(now)
                one.on_ref_zero((turn + 1) * 10**6 + block, block % 200, now)
            took[blocks] = time.process_time() - start
        ratios.append(took[128_000] / took[8_000])
    assert np.median(ratios) <= 3


def test_the_cost_of_a_run_is_that_of_its_blocks_and_of_its_tokens():
    assert COST.run(3, 9) == pytest.approx(sum(COST(index) for index in range(3, 9)))
    token = sum(0.216e-3 + 7.1e-9 * (context + 0.5) for context in range(512 * 3, 512 * 5))
    assert COST.run(3, 5) == pytest.approx(token)
    assert COST.run(4, 4) == 0


def test_holes_save_what_lies_behind_them_and_prefixes_do_not():
    sequences = enumerate([(1, 2, 3), (4,), (1, 2, 3)])
    jobs = [Job(Request(n, 512 * len(blocks), blocks), 1, arrival=float(n)) for n, blocks in sequences]

    class First(LRU):
        def put(self, blocks, start, now):
            self.blocks.update(dict.fromkeys(blocks))

    results = [replay(Trace("made", jobs), KVStore(3, First()), FLAT, holes) for holes in (True, False)]
    assert [result.seconds for result in results] == [5, 7]
    assert [(result.block_hits, result.request_hits) for result in results] == [(2, 1), (0, 0)]
    assert results[0].recomputed == 5 / 7


def test_later_turns_arrive_when_earlier_ones_are_served():
    last = Job(Request(1, 512, (2,)), 1)
    first = Job(Request(0, 512, (1,)), 1, arrival=1.0, next=last, gap=5.0)
    other = Job(Request(2, 512, (3,)), 1, arrival=3.0)
    assert list(arrivals(Trace("made", [first, other]))) == [(1.0, (1,)), (3.0, (3,)), (6.0, (2,))]


def test_chunks_shrink_with_decodes_between_floor_and_base():
    policy = Shrinking(base=2048, threshold=16, floor=256)
    assert [policy.chunk(n) for n in (0, 16, 32, 64, 1000)] == [2048, 2048, 1024, 512, 256]
    assert [Fixed(512).chunk(n) for n in (0, 1000)] == [512, 512]
    with pytest.raises(StropError, match="floor"):
        Shrinking(base=100)


def test_kv_is_kept_as_long_as_its_tool_is_likely_to_end():
    ttl = ContinuumTTL(prior_s=2.0)
    assert ttl.ttl(10.0, 0.5) == pytest.approx(2.0 * math.log(10.0))
    assert ttl.ttl(0.5, 0.5) == 0
    for seconds in [1.0] * (ENOUGH - 1) + [100.0]:
        ttl.observe(seconds, "search")
    assert ttl.ttl(10.0, 0.5, "search") == 1.0
    assert ttl.ttl(10.0, 0.001, "search") == 100.0
    assert ttl.ttl(0.4, 0.5, "search") == 0
    grid = np.linspace(0.01, 30, 3000)
    best = grid[np.argmax(10 * (1 - np.exp(-grid / 2)) - 0.5 * grid)]
    assert ttl.ttl(10.0, 0.5, "other") == pytest.approx(best, abs=0.02)


@pytest.mark.parametrize("make", [lambda: Reuse(0), lambda: Reuse(1, p=1), lambda: RecomputeCost(0, 1)])
def test_settings_that_mean_nothing_are_refused(make):
    with pytest.raises(StropError):
        make()
