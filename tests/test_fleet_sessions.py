"""Sessions in the simulator: answers that are prompts later, pins while tools run, programs in order."""

from itertools import pairwise

import numpy as np
import pytest
from routing import identical

from strop.core.blocks import KVStore
from strop.core.chunks import Fixed
from strop.core.evict import ONLINE
from strop.core.evict.asymcache import AsymCache
from strop.core.evict.worth import Reuse
from strop.serve.base import Job, Request, Trace
from strop.serve.cluster import Cluster, Group
from strop.serve.decode import spoken
from strop.serve.latency import Roofline
from strop.serve.mixed import EVERY
from strop.serve.routing import POLICIES
from strop.serve.simulate import Simulation
from strop.serve.topology import Flat
from strop.serve.traces import agents

PLAIN = Roofline(prefill_token=1e-4, prefill_pair=0, iteration=0.01, decode_request=0, decode_token=0)
DEAR = Roofline(prefill_token=1e-2, prefill_pair=0, iteration=1e-4, decode_request=0, decode_token=0)
"""Prompts that are worth a pin."""
BLOCK = 16


def session(number: int, start: float, turns: list[tuple[int, int, float]], tool: bool = True) -> Job:
    """Prompt, answer and gap of each turn; every prompt begins with all before it."""
    jobs = []
    for turn, (prompt, output, gap) in enumerate(turns):
        whole, rest = divmod(prompt, BLOCK)
        blocks = tuple(1000 * number + place for place in range(whole))
        blocks += (1000 * number + 500 + turn,) if rest else ()
        called = tool and turn < len(turns) - 1
        request = Request(100 * number + turn, prompt, blocks, number, called)
        jobs.append(Job(request, output, start, gap=gap))
    for job, after in pairwise(jobs):
        job.next = after
    return jobs[0]


def filler(number: int, start: float, blocks: int) -> Job:
    """A request that fills the store and is never asked for again."""
    return session(number, start, [(BLOCK - 1, BLOCK * (blocks - 1), 0.0)])


def run(jobs: list[Job], tokens: int = 40 * BLOCK, base: int = 4096, latency=PLAIN, **fields):
    group = Group(role="both", hosts=(0,), latency=latency, kv_tokens=tokens, chunk=Fixed(base), **fields)
    made = Trace("made", sorted(jobs, key=lambda job: job.arrival), BLOCK)
    simulation = Simulation(Cluster(network=Flat(hosts=1), instances=(group,)), made, POLICIES["jsq"]())
    results = simulation.run()
    simulation.check()
    c = results.columns
    found = {id: {name: c[name][i] for name in c} for i, id in enumerate(c["id"].tolist())}
    return found, simulation


def test_an_answer_is_found_where_the_next_prompt_repeats_it():
    found, _ = run([session(1, 0.0, [(40, 30, 1.0), (90, 4, 0.0)])])
    assert [found[100 + turn]["reused"] for turn in (0, 1)] == [0, 70 // BLOCK * BLOCK]


@pytest.mark.parametrize("prompt", [40, 33, 32])
@pytest.mark.parametrize("output", [1, 8, 24, 25])
def test_answers_are_cached_in_a_store_that_is_just_large_enough(prompt, output):
    room = -(-(prompt + output) // BLOCK) * BLOCK
    found, simulation = run([session(1, 0.0, [(prompt, output, 1.0), (prompt, output, 0.0)])], tokens=room)
    assert found[101]["reused"] >= prompt // BLOCK * BLOCK - 1
    assert simulation.decodes[0].store.cached <= room // BLOCK


def test_blocks_of_another_conversation_are_not_taken_for_an_answer():
    one, other = session(1, 0.0, [(40, 30, 0.0)]), session(2, 0.0, [(90, 4, 0.0)])
    assert spoken(one, BLOCK) == ()
    one.next = other
    assert spoken(one, BLOCK) == ()
    one.next = session(1, 0.0, [(60, 4, 0.0)])
    assert spoken(one, BLOCK) == (1000, 1001, 1002)


def pressure(gap: float = 1.5) -> list[Job]:
    """A tool that runs for a while, and requests that fill all that a pin leaves of 40 blocks."""
    return [
        session(1, 0.0, [(64, 32, gap), (112, 4, 0.0)]),
        *(filler(number, 0.5 + 0.2 * number, 34) for number in range(2, 6)),
    ]


def test_what_is_pinned_outlives_what_would_have_evicted_it():
    plain, _ = run(pressure(), latency=DEAR)
    pinned, simulation = run(pressure(), latency=DEAR, pin=True)
    assert plain[101]["reused"] < pinned[101]["reused"] == 96
    assert not simulation.decodes[0].store.pinned


def test_no_pinned_block_is_ever_a_victim(monkeypatch):
    watched, evict = [], AsymCache.victim

    def victim(self, now):
        block = evict(self, now)
        stores = [store for store in made if store.evictor is self]
        watched.append(any(block in blocks for store in stores for _, blocks in store.pinned.values()))
        return block

    made: list[KVStore] = []
    start = KVStore.__init__
    monkeypatch.setattr(KVStore, "__init__", lambda self, *args: (made.append(self), start(self, *args))[1])
    monkeypatch.setattr(AsymCache, "victim", victim)
    simulate(agents(30, rate=1.5, seed=1), evict="asymcache", holes=True, pin=True, kv_tokens=90 * 512)
    assert len(watched) > 50 and not any(watched)


def test_a_pin_ends_when_the_tool_takes_longer_than_is_likely():
    found, simulation = run([*pressure(gap=60.0), filler(8, 55.0, 40)], latency=DEAR, pin=True)
    assert found[800]["begun"] == 55
    assert found[101]["reused"] == 0
    assert not simulation.decodes[0].store.pinned


def test_a_pin_lasts_until_its_turn_is_taken_in():
    """The tool ends before the pin would; its turn waits for three prompts that take all other memory."""
    long = [session(number, 0.8 + number / 10, [(34 * BLOCK - 1, 1, 0.0)]) for number in (2, 3, 4)]
    jobs = [session(1, 0.0, [(64, 32, 1.5), (112, 4, 0.0)]), *long]
    found, _ = run(jobs, latency=DEAR, batch=1, pin=True)
    assert found[101]["begun"] > found[101]["arrived"] + 10
    assert found[101]["reused"] == 96


def begun(order: str, **fields) -> list[int]:
    """Requests by the time at which their prompts begin, all of which but one wait for a long prompt."""
    jobs = [
        session(1, 0.0, [(32, 1, 1.0), (48, 1, 0.0)], tool=False),
        session(2, 0.1, [(32, 1, 0.9), (48, 1, 0.0)]),
        session(3, 0.9, [(20_000, 1, 0.0)]),
        *(session(number, 0.95 + number / 1000, [(64, 1, 0.0)]) for number in (4, 5)),
    ]
    found, _ = run(jobs, tokens=30_000, base=16, order=order, **fields)
    return sorted(found, key=lambda id: found[id]["begun"])[2:]


def test_programs_go_in_the_order_of_their_first_requests_and_pins_before_all():
    assert begun("fcfs") == [300, 400, 500, 101, 201]
    assert begun("program") == [300, 101, 201, 400, 500]
    assert begun("program", pin=True) == [300, 201, 101, 400, 500]


def test_an_evictor_hears_of_tools_where_nothing_is_pinned_and_when_a_pin_ends_too_soon(monkeypatch):
    heard = []
    monkeypatch.setattr(AsymCache, "on_tool_call", lambda self, blocks, now: heard.append(tuple(blocks)))
    said = tuple(range(1000, 1006))
    for pin, gap, times in ((False, 1.5, [said]), (True, 1.5, []), (True, 60.0, [said])):
        heard.clear()
        run([session(1, 0.0, [(64, 32, gap), (112, 4, 0.0)])], latency=DEAR, evict="asymcache", pin=pin)
        assert heard == times


def test_the_lifespan_follows_how_long_sessions_are_away():
    jobs = [session(1, 0.0, [(20 + 4 * turn, 1, 7.0) for turn in range(EVERY + 1)])]
    for tune, expected in ((False, 300.0), (True, 7.0)):
        _, simulation = run(jobs, evict="asymcache", tune=tune)
        lifespan = simulation.decodes[0].store.evictor.reuse.L
        assert lifespan == pytest.approx(expected)


def simulate(made: Trace, hosts: int = 1, policy: str = "jsq", **fields):
    group = Group(role="both", hosts=tuple(range(hosts)), latency=PLAIN, **fields)
    cluster = Cluster(network=Flat(hosts=hosts), instances=(group,))
    simulation = Simulation(cluster, made, POLICIES[policy]())
    results = simulation.run()
    simulation.check()
    return results


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("order", ["fcfs", "program"])
def test_no_turn_is_lost_whatever_is_pinned(name, order):
    made = agents(40, rate=3.0, seed=2)
    fields = {"evict": name, "order": order, "holes": True, "kv_tokens": 60 * 512, "reuse": Reuse(8.0)}
    for pin in (False, True):
        one, two = (simulate(made, 2, pin=pin, tune=True, **fields) for _ in range(2))
        assert len(one) == len(made)
        assert identical(one, two)


def test_a_session_comes_back_to_its_cache_where_the_policy_looks_for_it():
    made = agents(60, rate=2.0, seed=0)
    runs = {name: simulate(made, 4, name, kv_tokens=2000 * 512) for name in ("cache-aware", "round-robin")}
    stays = {}
    for name, found in runs.items():
        places = {}
        for number, place in zip(found.columns["session"], found.columns["decode"], strict=True):
            places.setdefault(number, set()).add(place)
        stays[name] = np.mean([len(where) == 1 for where in places.values()])
    assert stays["cache-aware"] > 0.9 > 0.5 > stays["round-robin"]


@pytest.mark.parametrize("field", [{"pin": True}, {"order": "program"}, {"tune": True}])
def test_sessions_are_looked_after_only_where_prompts_and_answers_share_an_instance(field):
    with pytest.raises(ValueError, match="for instances of both roles, not for decode"):
        Group(role="decode", hosts=(0,), **field)
    with pytest.raises(ValueError, match="order must be one of fcfs, program"):
        Group(role="both", hosts=(0,), order="lifo")
