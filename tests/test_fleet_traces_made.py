"""Arrival traces that are made up, replayed at other rates, or sessions that wait for their answers."""

from collections import OrderedDict

import numpy as np
import pytest

from strop.core.errors import StropError
from strop.serve.base import Job, Request, Trace
from strop.serve.traces import agents, around, documents, fixed, generate, replay, sessions, split
from strop.serve.traces.base import check
from strop.serve.traces.generated import SHAPES

TARGETS = {
    "conversation": (12_031, 3.40, 12_035, 343, (4.4, 21.1, 32.6, 35.5, 36.4)),
    "synthetic": (3_993, 3.91, 15_325, 149, (8.2, 42.3, 62.4, 64.0, 64.0)),
    "code": (8_819, 2.57, 2_048, 28, ()),
    "chat": (19_366, 5.53, 1_155, 211, ()),
}
"""Of the published traces: requests, rate, mean tokens in and out, percent of blocks that LRU caches hit."""


def facts(trace: Trace) -> list[tuple]:
    return [(job.request, job.output, job.arrival, job.gap, job.next is not None) for job in trace.all()]


def lru_hits(trace: Trace, capacity: int) -> float:
    """Percent of blocks that lead their prompt and are in an LRU cache of so many."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = total = 0
    for job in trace.jobs:
        ids = job.request.blocks
        hits += next((place for place, id in enumerate(ids) if id not in cache), len(ids))
        total += len(ids)
        for id in reversed(ids):
            cache[id] = None
            cache.move_to_end(id)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return 100 * hits / total


def bucketed() -> Trace:
    times = [0.0] * 40 + [3.0] * 40 + [9.0] + [12.0] * 40
    return Trace("buckets", [Job(Request(id, 10), 1, time) for id, time in enumerate(times)])


def test_spreading_fills_the_steps_of_the_clock_and_keeps_the_order():
    trace = bucketed()
    spread = replay(trace, seed=1)
    times = np.array([job.arrival for job in spread.jobs])
    assert [job.request for job in spread.jobs] == [job.request for job in trace.jobs]
    assert (np.diff(times) > 0).all()
    for start, bucket in ((0, times[:40]), (3, times[40:80]), (12, times[81:])):
        assert start <= bucket[0] < start + 1 < start + 2 < bucket[-1] < start + 3
    assert times[80] == 9.0
    assert facts(spread) == facts(replay(trace, seed=1)) != facts(replay(trace, seed=2))


def test_a_rate_divides_arrivals_and_leaves_the_trace_and_its_gaps_alone():
    trace = documents(requests=12, turns=3)
    before = facts(trace)
    fast = replay(trace, rate=2.5)
    assert [job.arrival for job in fast.jobs] == [job.arrival / 2.5 for job in trace.jobs]
    assert [job.gap for job in fast.all()] == [job.gap for job in trace.all()]
    assert facts(trace) == before == facts(replay(trace, spread=False))


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), 5e-324, 10**400, "2"])
def test_rates_that_are_none_are_refused(rate):
    with pytest.raises(StropError, match="rate must be"):
        replay(bucketed(), rate)


def test_a_trace_splits_by_time_into_parts_that_each_start_near_zero():
    trace = generate(requests=2000)
    first, rest = split(trace, 0.25)
    cut = 0.25 * trace.jobs[-1].arrival
    assert [job.request for job in first.jobs + rest.jobs] == [job.request for job in trace.jobs]
    assert first.jobs[-1].arrival < cut
    assert [job.arrival + cut for job in rest.jobs] == pytest.approx(
        [job.arrival for job in trace.jobs[len(first.jobs) :]]
    )


@pytest.mark.parametrize("share", [0, 1, -0.5, float("nan")])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(StropError, match="share"):
        split(bucketed(), share)


def test_a_split_that_leaves_one_part_empty_is_refused():
    with pytest.raises(StropError, match="one side"):
        split(Trace("one", bucketed().jobs[:3]), 0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_generated_traces_have_the_statistics_of_the_published_ones(shape):
    requests, rate, prompt, output, hits = TARGETS[shape]
    traces = [generate(shape, requests, seed) for seed in range(3)]
    jobs = [job for trace in traces for job in trace.jobs]
    assert len(jobs) == 3 * requests
    rates = [(requests - 1) / trace.jobs[-1].arrival for trace in traces]
    assert np.mean(rates) == pytest.approx(rate, rel=0.05)
    assert np.mean([job.request.prompt for job in jobs]) == pytest.approx(prompt, rel=0.05)
    assert np.mean([job.output for job in jobs]) == pytest.approx(output, rel=0.2)
    assert all(trace.hashed == bool(hits) for trace in traces)
    for capacity, target in zip((1_000, 10_000, 30_000, 50_000, 100_000), hits, strict=False):
        assert lru_hits(traces[0], capacity) == pytest.approx(target, abs=2.5)


@pytest.mark.parametrize("make", [generate, fixed, documents, agents], ids=lambda make: make.__name__)
def test_a_seed_fixes_a_trace_and_another_changes_it(make):
    first = [2048] if make is fixed else []
    assert facts(make(*first, seed=3)) == facts(make(*first, seed=3)) != facts(make(*first, seed=4))


@pytest.mark.parametrize("shape", ["conversation", "synthetic"])
def test_a_trace_may_have_few_requests(shape):
    for count in range(1, 15):
        assert facts(generate(shape, count)) == facts(generate(shape, 90))[:count]


def test_a_shorter_generated_trace_begins_a_longer_one():
    assert facts(generate("synthetic", 300)) == facts(generate("synthetic", 900))[:300]


@pytest.mark.parametrize(
    "trace",
    [
        generate("conversation", 1500),
        generate("synthetic", 1500),
        fixed(1000, 20),
        documents(),
        documents("loogle", 100, turns=7),
        agents(60),
    ],
    ids=lambda trace: trace.name,
)
def test_block_ids_are_chained_and_arrivals_in_order(trace):
    check(trace)
    times = [job.arrival for job in trace.jobs]
    assert times[0] == 0.0
    assert times == sorted(times)
    assert len({job.request.id for job in trace.all()}) == len(trace)


@pytest.mark.parametrize("prompt", [1, 512, 1024, 65_536])
def test_fixed_prompts_have_one_length_and_share_nothing(prompt):
    trace = fixed(prompt, requests=50, rate=2.0)
    ids = [id for job in trace.jobs for id in job.request.blocks]
    assert {job.request.prompt for job in trace.jobs} == {prompt}
    assert len(ids) == len(set(ids)) == 50 * -(-prompt // 512)


@pytest.mark.parametrize("trace", [documents(turns=7, requests=100), agents(50)], ids=lambda t: t.name)
def test_a_turn_brings_the_prompt_and_answer_before_it(trace):
    followed = 0
    for job in trace.all():
        if (after := job.next) is None:
            assert job.gap == 0.0
            continue
        followed += 1
        kept = job.request.prompt // trace.block
        assert after.request.session == job.request.session
        assert after.request.prompt > job.request.prompt + job.output
        assert after.request.blocks[:kept] == job.request.blocks[:kept]
        assert after.request.blocks[kept] not in job.request.blocks
        assert job.gap > 0.0
    assert followed == len(trace) - len(trace.jobs) > 0


def test_sessions_share_the_start_and_nothing_else():
    one, other = (set(job.request.blocks) for job in documents(requests=12).jobs)
    assert one & other == {0, 1}
    assert sessions.SHARED == 2 * 512


@pytest.mark.parametrize(
    ("dataset", "prompt", "output", "dispersion"),
    [("longbench", 34_800, 2_600, 5.0), ("loogle", 24_400, 700, 10.0)],
)
def test_documents_have_the_lengths_and_times_that_were_asked_for(dataset, prompt, output, dispersion):
    trace = documents(dataset, 3000, rate=0.04, dispersion=dispersion, turns=6)
    jobs = trace.all()
    assert (len(jobs), len(trace.jobs)) == (3000, 500)
    assert np.mean([job.request.prompt for job in jobs]) == pytest.approx(prompt, rel=0.03)
    assert np.mean([job.output for job in jobs]) == pytest.approx(output, rel=0.03)
    between = np.diff([job.arrival for job in trace.jobs])
    gaps = np.array([job.gap for job in jobs if job.next])
    assert between.mean() == pytest.approx(6 / 0.04, rel=0.05)
    assert gaps.mean() == pytest.approx(dispersion * 6 / 0.04, rel=0.05)
    for times in (between, gaps):
        assert times.std() / times.mean() == pytest.approx(0.25, rel=0.15)


def test_agents_call_a_tool_after_every_answer_but_the_last():
    trace = agents(400, rate=2.0, turns=4.0)
    jobs = trace.all()
    assert all(job.request.tool_call == (job.next is not None) for job in jobs)
    assert len(jobs) / len(trace.jobs) == pytest.approx(4.0, rel=0.15)
    assert 399 / trace.jobs[-1].arrival == pytest.approx(2.0, rel=0.15)


def test_a_tool_takes_its_own_time():
    trace = agents(400, tools=(sessions.Tool(median=3.0, sigma=0.5, result=100),))
    gaps = np.log([job.gap for job in trace.all() if job.next])
    assert gaps.mean() == pytest.approx(np.log(3.0), abs=0.1)
    assert gaps.std() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: generate("conversatoin"), "did you mean 'conversation'"),
        (lambda: generate(requests=0), "requests must be"),
        (lambda: generate(requests=10**9), "requests must be"),
        (lambda: generate(seed=-1), "seed must be"),
        (lambda: fixed(0), "prompt must be"),
        (lambda: fixed(10, rate=0.0), "rate must be"),
        (lambda: documents("longbenchs"), "did you mean 'longbench'"),
        (lambda: documents(turns=40), "no room"),
        (lambda: documents(dispersion=-1.0), "dispersion must be"),
        (lambda: agents(turns=0.5), "at least 1 turn"),
        (lambda: agents(turns=1e8), "requests of all programs"),
        (lambda: agents(tools=()), "tools to call"),
    ],
)
def test_settings_that_make_no_trace_are_refused(make, why):
    with pytest.raises(StropError, match=why):
        make()


@pytest.mark.parametrize("blocks", [(1, 0), (2, 1), (0,), (0, 1, 2)])
def test_a_block_in_two_places_or_a_prompt_short_of_one_is_found(blocks):
    jobs = [Job(Request(id, 600, ids), 1) for id, ids in enumerate(((0, 1), blocks))]
    with pytest.raises(ValueError, match="block"):
        check(Trace("bad", jobs))


def test_requests_around_means_come_at_a_steady_pace():
    made = around(576, 588, 2.0, 4000, seed=3)
    prompts = np.array([job.request.prompt for job in made.jobs])
    outputs = np.array([job.output for job in made.jobs])
    assert prompts.mean() == pytest.approx(576, rel=0.03) and outputs.mean() == pytest.approx(588, rel=0.03)
    assert prompts.std() / prompts.mean() == pytest.approx(0.5, rel=0.05) and not made.hashed
    assert np.diff([job.arrival for job in made.jobs]) == pytest.approx(2.0)
