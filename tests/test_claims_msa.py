"""Claims of AsymCache's attention: experiments run, controls behave; no hypothesis is tested."""

import time

import pytest
import torch
from claiming import require_steady, require_whole

from strop.claims import PAPERS, SCHEDULERS, msa, msa_bed, msa_study
from strop.claims.base import Paper, Part, Progress, Table, beside, joined
from strop.claims.msa_study import FROM_FIRST, PACKED, PASSES, fitted, pieces, ways
from strop.core.errors import StropError

SMALL = msa_bed.Scale(
    name="tiny",
    seeds=2,
    rounds=1,
    context=128,
    holes=(2, 4),
    hole=16,
    block=16,
    blocks=4,
    sessions=3,
    turns=2,
    first=40,
    more=10,
    answer=2,
    pages=(12,),
)
PLAINLY = Progress(lambda what, share: None, 1)


@pytest.fixture(scope="module")
def bed():
    return msa_bed.lay(SMALL, PLAINLY)


@pytest.fixture(scope="module")
def measured(bed):
    """The tables, and the share done before each measurement."""
    shares: list[float] = []
    parts = msa.PAPER.parts(SMALL)
    progress = Progress(lambda what, share: shares.append(share), sum(one.steps for one in parts))
    return joined(one.study(bed, progress) for one in parts), shares, progress.expected


def test_every_claim_has_a_verdict_and_plain_details(measured):
    tables, shares, steps = measured
    require_whole(msa.PAPER.verdicts(tables, SMALL), 7, "asymcache", seeds=(2,))
    require_steady(shares, steps)


def test_claims_need_the_models_and_a_device(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StropError, match="no CUDA device"):
        msa_bed.lay(msa_bed.SCALES["gpu"], PLAINLY)
    monkeypatch.setenv("STROP_ZOO", str(tmp_path))
    with pytest.raises(StropError, match="no bundled model"):
        msa_bed.lay(msa_bed.SCALES["cpu"], PLAINLY)


# Holes and sessions.


def test_ways_compute_the_same_positions():
    lost = [at for piece in pieces(SMALL, 4) for at in piece]
    assert lost == sorted(set(lost)) and lost[-1] == SMALL.context - 1 and len(lost) == 4 * SMALL.hole
    for way, passes in ways(SMALL, 4).items():
        computed = [at for shares in passes for piece in shares for at in piece]
        assert set(lost) <= set(computed)
        assert (computed == lost) is (way != FROM_FIRST)
    assert len(ways(SMALL, 4)[PACKED]) == 1 and len(ways(SMALL, 4)[PASSES]) == 4


def test_a_way_that_computes_other_logits_stops_the_experiment(bed, monkeypatch):
    timed = msa_bed.Context.timed
    calls = iter(range(100))
    monkeypatch.setattr(
        msa_bed.Context, "timed", lambda self, passes: (0.0, timed(self, passes)[1] + next(calls))
    )
    with pytest.raises(RuntimeError, match="control failed: an attention a piece computes other logits"):
        msa_study.hole_study(bed, PLAINLY, SMALL)


def test_sessions_grow(bed):
    drawn = msa_bed.sessions(SMALL, bed.texts, 0)
    assert len(drawn.turns) == SMALL.sessions * SMALL.turns
    assert [turn.when for turn in drawn.turns] == sorted(turn.when for turn in drawn.turns)
    assert drawn == msa_bed.sessions(SMALL, bed.texts, 0)
    for evictor in (msa_study.NO_CACHE, msa_study.ASYM):
        server = msa_study.Server(bed.texts, SMALL.answer, drawn, evictor, 16)
        for turn in drawn.turns:
            server(turn)
        server.cache.store.check()
        done = server.done
        last = max(done, key=lambda one: len(one.prompt))
        assert len(last.prompt) == SMALL.first + SMALL.answer + SMALL.more
        computed = msa_study.summed(done)["computed"]
        assert computed == 1 if evictor == msa_study.NO_CACHE else computed < 1


def test_the_clock_stands_at_an_arrival_and_never_goes_back():
    clock = msa_bed.Clock()
    clock.arrive(100.0)
    start, until = clock(), time.process_time() + 0.01
    while time.process_time() < until:
        pass
    assert 100 <= start < 100.005 and clock() - start >= 0.009
    clock.stop()
    stood = clock()
    assert clock() == stood
    clock.arrive(5.0)
    assert clock() >= stood


def test_lines_by_hand():
    a, b, square, ranks = fitted([1.0, 3.0, 5.0, 7.0])
    assert (a, b, square, ranks) == pytest.approx((1, 2, 1, 1))
    assert fitted([1.0, 3.0, 2.0])[3] == pytest.approx(0.5)


# Both sides of a paper.


def test_both_sides_of_a_paper_are_one():
    whole, scheduler = PAPERS["asymcache"](), SCHEDULERS["asymcache"]()
    parts = [one.name for one in whole.parts(whole.scales["cpu"])]
    alone = [one.name for one in scheduler.parts(scheduler.scales["cpu"])]
    assert parts[: len(alone)] == alone and len(set(parts)) == len(parts) > len(alone)

    def side(name: str) -> Paper:
        study = Part(name, 1, lambda bed, progress: {name: Table([{"bed": bed}], 0.0)})
        return Paper(
            scales={"cpu": name},
            lay=lambda size, progress: f"bed of {size}",
            laying=1,
            parts=lambda size: [study],
            verdicts=lambda tables, size: [(size, tables[name].pick("bed"))],
        )

    both = beside(side("one"), side("other"))
    size = both.scales["cpu"]
    beds = both.lay(size, PLAINLY)
    tables = joined(one.study(beds, PLAINLY) for one in both.parts(size))
    assert both.verdicts(tables, size) == [("one", "bed of one"), ("other", "bed of other")]
    assert both.laying == 2
