"""Claims about AsymCache: experiments run, repeat and behave where answers are known; no answer is tested."""

import json

import numpy as np
import pytest
from claiming import require_whole

from strop.claims.asymcache import harmless, pressed, robust, verdicts
from strop.claims.asymcache_bed import (
    ASYM,
    BELADY,
    GHOST,
    LRU,
    MADE,
    MAX_SCORE,
    PENSIEVE,
    REAL,
    Scale,
    away,
    cost,
    job_times,
    lay,
    reused,
    served,
)
from strop.claims.asymcache_study import (
    AGENTS,
    ALWAYS,
    CHUNKS,
    EAGER,
    LRU_EAGER,
    LRU_SHRINKS,
    PLAIN,
    SETTINGS,
    SHRINKS,
    SYSTEMS,
    Linear,
    drawn,
    parts,
)
from strop.claims.asymcache_use import TIMES, brings, cells, shrinking, together, unshrunk
from strop.claims.asymcache_use import served as use_served
from strop.claims.base import Progress, Table, joined
from strop.core.evict.asymcache import AsymCache
from strop.core.evict.worth import Reuse
from strop.serve.base import Job, Request, Trace
from strop.serve.traces import agents

TINY = Scale(
    name="tiny",
    seeds=3,
    runs=2,
    requests=36,
    blocks=(200, 300),
    real=(60,),
    made=(60, 200),
    conversations=120,
    served=(("loogle", 5.0),),
    rates=(0.02, 0.06),
    programs=12,
    loads=((0.5, 80),),
    prompts=8,
    control=(500, 2000),
    evictions=100,
)
QUIET = Progress(lambda what, share: None, 1)


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """Generated conversations only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STROP_DATA", str(tmp_path_factory.mktemp("none")))
        return lay(TINY, QUIET)


@pytest.fixture(scope="module")
def tables(bed):
    shares: list[float] = []
    each = parts(TINY)
    progress = Progress(lambda what, share: shares.append(share), sum(one.steps for one in each))
    return joined(one.study(bed, progress) for one in each), shares


def test_every_claim_says_everything(tables):
    require_whole(verdicts(tables[0], TINY), 12, "asymcache")


def test_progress_never_goes_back_and_ends_in_time(tables):
    shares = tables[1]
    assert shares == sorted(shares) and shares[0] == 0 and 0.9 < shares[-1] < 1


def test_all_but_times_repeats(bed, tables):
    for one in parts(TINY):
        if not one.timed:
            for name, table in one.study(bed, QUIET).items():
                assert all(row in tables[0][name].rows for row in table.rows), one.name


def test_rows_hold_one_value_a_repetition(tables):
    repetitions = {"sessions": TINY.seeds, "agents": TINY.seeds}
    for name, table in tables[0].items():
        for row in table.rows:
            for value in row.values():
                assert not isinstance(value, list) or len(value) == repetitions.get(name, TINY.runs)


def test_everything_that_is_compared_was_measured(tables):
    sessions, serving = tables[0]["sessions"], tables[0]["serving"]
    first, second = ({row["evictor"] for row in sessions.where(blocks=blocks)} for blocks in TINY.blocks)
    assert first > second == {LRU, ASYM} and {BELADY, GHOST, MAX_SCORE} < first
    assert {row["system"] for row in serving.rows} == set(SYSTEMS)
    assert len(serving.rows) == len(SYSTEMS) * len(TINY.rates)
    assert len(tables[0]["settings"].rows) == len(SETTINGS)
    assert {row["trace"] for row in tables[0]["conversations"].rows} == {MADE}


def test_evictors_whose_order_is_known_behave(tables):
    """The oracle recomputes least; Max-Score, which goes by age alone, exactly as much as LRU."""
    for dispersion in TINY.dispersions:
        rows = tables[0]["sessions"].where(dispersion=dispersion, blocks=TINY.blocks[0])
        seconds = {row["evictor"]: np.array(row["seconds"]) for row in rows}
        assert all((seconds[BELADY] <= other * (1 + 1e-9)).all() for other in seconds.values())
        assert seconds[MAX_SCORE] == pytest.approx(seconds[LRU])


def test_shorter_chunks_shorten_the_time_between_tokens_and_slow_prefill(tables):
    for model in {row["model"] for row in tables[0]["chunks"].rows}:
        gaps, rates = (
            [np.mean(tables[0]["chunks"].pick(measure, model=model, chunk=chunk)) for chunk in CHUNKS]
            for measure in ("gap_p99", "prefill_rate")
        )
        assert gaps[1] < gaps[2] < gaps[0] and rates[1] < rates[2] < rates[0]


def test_a_scan_chooses_what_the_heaps_choose():
    worth, reuse = cost(Trace("", [])), Reuse(5.0, 0.9)
    heaps, scan = AsymCache(worth, reuse, adapt=False), Linear(worth, reuse)
    places = np.random.default_rng(0).permutation(300).tolist()
    for evictor in (heaps, scan):
        for block, place in enumerate(places):
            evictor.on_ref_zero(block, place, block * 0.05)
    assert [heaps.victim(16.0) for _ in places] == [scan.victim(16.0) for _ in places]


def test_the_published_trace_is_read_where_it_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "mooncake"
    folder.mkdir()
    row = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}
    (folder / "conversation_trace.jsonl").write_text(json.dumps(row))
    monkeypatch.setenv("STROP_DATA", str(tmp_path))
    found = lay(TINY, QUIET).conversations
    assert list(found) == [REAL, MADE] and [len(trace) for trace in found[REAL]] == [1]


def test_lifespans_are_those_of_the_trace():
    jobs = [Job(Request(n, 1024, (0, 1)), 1, arrival=time) for n, time in enumerate((0.0, 2.0, 4.0))]
    assert pytest.approx(2.0) == reused(Trace("made", jobs)).L
    jobs[0].next, jobs[0].gap = jobs[1], 7.0
    assert pytest.approx(7.0) == away(Trace("made", jobs[:1])).L


def test_a_program_lasts_from_its_first_arrival_to_its_last_end():
    found = served(agents(8, rate=1.0, seed=1), 400)
    c, times = found.columns, job_times(found)
    assert len(times) == 8
    own = c["session"] == 3
    assert times[3] == pytest.approx(c["ended"][own].max() - c["arrived"][own].min())


def test_draws_differ_and_chunks_shrink_from_the_second_decode_on():
    one, two = (drawn(TINY, 5.0, seed) for seed in (0, 1))
    assert [job.gap for job in one.all()] != [job.gap for job in two.all()]
    assert [ALWAYS.chunk(decodes) for decodes in (1, 2, 100)] == [2048, 1024, 256]


def conversation(evictor: str, blocks: int, *seconds: float) -> dict:
    return {"trace": MADE, "blocks": blocks, "evictor": evictor, "seconds": list(seconds)}


def test_what_an_evictor_loses_is_judged_at_its_worst_size():
    rows = [conversation(LRU, blocks, 100.0, 200.0) for blocks in (1, 2)]
    rows += [conversation(ASYM, 1, 90.0, 180.0), conversation(ASYM, 2, 103.0, 206.0)]
    claim = harmless(TINY, Table(rows, 1.0), ASYM, "somehow")
    assert claim.interval == pytest.approx((3, 3)) and claim.verdict == "not here"
    rows[-1]["seconds"] = [101.0, 202.0]
    assert harmless(TINY, Table(rows, 1.0), ASYM, "somehow").verdict == "reproduced"


def session(evictor: str, blocks: int, hits: float, seconds: float) -> dict:
    return {"dispersion": 5.0, "blocks": blocks, "evictor": evictor} | {
        "hits": [hits] * 2,
        "seconds": [seconds] * 2,
    }


def test_pressure_is_where_lru_hits_some_and_not_most():
    rows = [session(LRU, size, hits, 100.0) for size, hits in ((1, 0.1), (2, 0.4), (3, 0.9))]
    rows += [session(ASYM, size, 0.5, seconds) for size, seconds in ((1, 99.0), (2, 80.0), (3, 120.0))]
    claim = pressed(TINY, Table(rows, 1.0))
    assert claim.interval == pytest.approx((20, 20)) and claim.verdict == "reproduced"
    nowhere = pressed(TINY, Table([row for row in rows if row["blocks"] != 2], 1.0))
    assert nowhere.interval is None and nowhere.verdict == "not here"


def test_a_share_of_nothing_is_nothing():
    lru, plain, full = (np.array([value, 2 * value]) for value in (10.0, 9.0, 5.0))
    assert brings(plain - full, lru - full, 0.8) and not brings(plain - full, lru - full, 0.81)
    assert not brings(plain - lru, plain - lru, 0.1)


SERVED = {
    "system": (LRU, MAX_SCORE, PENSIEVE, PLAIN, SHRINKS, EAGER, LRU_SHRINKS, LRU_EAGER),
    "seconds": (10.0, 10.0, 10.0, 9.0, 5.0, 6.0, 6.0, 7.0),
}


def serving(rates: tuple[float, ...] = (TINY.rates[-1],), **seconds: float) -> Table:
    """What serves sessions, all of its times in two draws as told."""
    usual = dict(zip(SERVED["system"], SERVED["seconds"], strict=True)) | seconds
    rows = [
        {"dataset": "loogle", "dispersion": 5.0, "rate": rate, "system": name}
        | {measure: [time, time] for measure in TIMES}
        for rate in rates
        for name, time in usual.items()
    ]
    return Table(rows, 1.0)


@pytest.mark.parametrize(
    ("control", "verdict"), [(6.0, "reproduced"), (8.0, "partly"), (9.5, "not here"), (10.0, "not here")]
)
def test_chunks_that_shrink_must_help_lru_as_well(control, verdict):
    assert shrinking(TINY, serving(**{LRU_SHRINKS: control})).verdict == verdict


def test_cells_where_chunks_never_shrank_are_named():
    table = serving(rates=(0.01, 0.02))
    assert unshrunk(table, cells(table)) == "chunks shrank in every cell"
    for row in table.where(rate=0.01, system=SHRINKS):
        row |= {measure: [9.0, 9.0] for measure in TIMES}
    assert unshrunk(table, cells(table)).endswith("in 1 of 2 cells: loogle 5:1 at 0.01")
    table.where(rate=0.01, system=SHRINKS)[0]["queue"] = [9.0, 9.0 + 1e-12]
    assert unshrunk(table, cells(table)) == "chunks shrank in every cell"


@pytest.mark.parametrize(("ahead", "verdict"), [(3, "reproduced"), (2, "partly"), (1, "not here")])
def test_serving_is_partly_ahead_where_it_is_in_most_comparisons(ahead, verdict):
    slow = dict.fromkeys((LRU, MAX_SCORE, PENSIEVE)[ahead:], 4.0)
    claim = use_served(TINY, serving(**slow), "ttft", "claim", "value")
    assert claim.verdict == verdict and "LRU with the same chunks, not judged: loogle" in claim.measured


@pytest.mark.parametrize(("below", "verdict"), [(4, "reproduced"), (3, "partly"), (2, "not here")])
def test_settings_are_partly_robust_where_most_are(below, verdict):
    rows = [
        {"setting": setting, "value": value, "hits": [0.3, 0.3], "lru": [10.0, 10.0]}
        | {"seconds": [9.0 if place < below else 11.0] * 2}
        for place, (setting, value) in enumerate((("L", 0.6), ("L", 1.4), ("p", 0.9), ("R", 10.0)))
    ]
    assert robust(TINY, Table(rows, 1.0)).verdict == verdict


@pytest.mark.parametrize(
    ("both", "continuum", "verdict"),
    [(8.05, 9.0, "reproduced"), (8.2, 9.0, "not here"), (8.0, 8.0, "not here"), (8.05, 8.05, "not here")],
)
def test_both_parts_together_must_beat_continuum_and_be_near_the_better_one(both, continuum, verdict):
    """By system: LRU, AsymCache, Continuum, both."""
    jobs = dict(zip(AGENTS, (10.0, 8.0, continuum, both), strict=True))
    rows = [
        {"rate": 1.0, "blocks": 5, "system": name, "job": [time] * 2, "job_p90": [time] * 2}
        for name, time in jobs.items()
    ]
    claim = together(TINY, Table(rows, 1.0))
    change = 100 * (both / continuum - 1)
    assert claim.verdict == verdict and claim.interval == pytest.approx((change, change), abs=1e-9)
