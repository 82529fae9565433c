"""Claims of NetKV: which numbers give which verdict."""

import pytest

from strop.claims import netkv
from strop.claims.base import Table
from strop.claims.netkv_bed import (
    CACHE_LOAD,
    FULL,
    GPUS,
    RATES,
    ROUND_ROBIN,
    SELF,
    STATIC,
    TELEMETRY,
    Scale,
    saved,
)
from strop.claims.netkv_limits import contention, crowded, quick, sizes, stale
from strop.claims.netkv_settings import growing, keeps, vanishing
from strop.claims.netkv_study import CORE, GAMMAS, ROOMS, SPINE, TIED, UNTOLD, USUAL, WALK

TINY = Scale(name="tiny", seeds=3, gpus=(64, 128))


def test_what_is_saved_is_a_percentage_of_sums_paired_by_repetition():
    found = saved({"ttft": [1.0, 3.0]}, {"ttft": [2.0, 3.0]})
    assert found.mean == pytest.approx(20) and found.ends == pytest.approx((0, 50))
    assert str(found) == "20.0 % (0.0 to 50.0)"


USUALLY = {"queue": 0.0, "transfer": 1.0, "tbt": 12.0, "slo": 0.9, "pod": 0.5, "crowding": 1.0}


def row(ttft: float, measures: dict[str, float] | None = None, **settings) -> dict:
    """Three repetitions that hardly differ."""
    values = {"ttft": ttft, **USUALLY, **(measures or {})}
    lists = {name: [value * (1 + 1e-4 * i) for i in range(3)] for name, value in values.items()}
    return {"trace": "generated conversation", "requests": 9, **settings, **lists}


LABELS = {
    "rr": ROUND_ROBIN,
    "cl": CACHE_LOAD,
    "static": STATIC,
    "own": SELF,
    "alone": TELEMETRY,
    "full": FULL,
}


def rates(measure: str = "ttft", **found: float) -> Table:
    """Every policy at both rates; one measure as said."""
    usual = {"rr": 2.0, "cl": 1.8, "static": 1.6, "own": 1.58, "full": 1.57}
    rows = []
    for name, ttft in usual.items():
        measures = {measure: found[name]} if name in found else {}
        rows += [row(ttft, measures, policy=LABELS[name], rate=rate) for rate in RATES]
    return Table(rows, 1.0)


@pytest.mark.parametrize(
    ("full", "over_blind", "over_tuned"),
    [
        (1.6, "reproduced", "reproduced"),
        (1.75, "partly", "partly"),
        (1.0, "partly", "reproduced"),
        (2.1, "not here", "not here"),
    ],
)
def test_gains_are_judged_by_named_shares(full, over_blind, over_tuned):
    assert [one.verdict for one in netkv.gains(TINY, rates(full=full))] == [over_blind, over_tuned]


@pytest.mark.parametrize(("full", "verdict"), [(0.93, "reproduced"), (0.91, "partly"), (0.8, "not here")])
def test_requests_in_time_are_judged_in_points(full, verdict):
    assert netkv.in_time(TINY, rates("slo", full=full)).verdict == verdict


@pytest.mark.parametrize(("full", "verdict"), [(12.4, "reproduced"), (13.0, "not here")])
def test_tokens_may_come_later_by_a_named_time(full, verdict):
    settings = [row(1.0, setting=s, policy=p) for s in (USUAL, UNTOLD) for p in (FULL, ROUND_ROBIN)]
    assert netkv.later(TINY, rates("tbt", full=full), Table(settings, 1.0)).verdict == verdict


@pytest.mark.parametrize(
    ("steps", "static", "each"),
    [
        ({}, "reproduced", "reproduced"),
        ({"static": 1.7}, "not here", "reproduced"),
        ({"own": 1.7, "full": 1.65}, "reproduced", "partly"),
        ({"own": 1.7, "full": 1.9}, "not here", "not here"),
    ],
)
def test_the_ladder_is_judged_by_the_share_of_its_first_step_and_the_signs_of_others(steps, static, each):
    table = rates(**steps)
    assert netkv.mostly_static(TINY, table).verdict == static
    assert netkv.every_step(TINY, table).verdict == each


def traffic(**ttft: float) -> Table:
    usual = {"static": 2.0, "own": 2.0, "alone": 2.0, "full": 2.0, "old": 2.0} | ttft
    rows = [
        row(usual[name], traffic=kind, refresh=1.0, policy=LABELS[name])
        for kind in (WALK, CORE, SPINE)
        for name in ("static", "own", "alone", "full")
    ]
    for refresh, name in ((0.1, "full"), (10.0, "old"), (60.0, "old")):
        rows.append(row(usual[name], traffic=WALK, refresh=refresh, policy=FULL))
    return Table(rows, 1.0)


@pytest.mark.parametrize(("old", "verdict"), [(2.05, "reproduced"), (1.95, "reproduced"), (2.2, "not here")])
def test_old_telemetry_may_change_ttft_by_a_named_share(old, verdict):
    assert stale(TINY, traffic(old=old)).verdict == verdict


@pytest.mark.parametrize(("full", "verdict"), [(1.8, "reproduced"), (1.95, "partly"), (2.1, "not here")])
def test_telemetry_that_helps_nothing_is_called_unhelpful(full, verdict):
    claim = crowded(TINY, traffic(full=full))
    assert claim.verdict == verdict and ("unhelpful" in claim.reason) == (verdict == "not here")


@pytest.mark.parametrize(
    ("full", "gone", "grown"),
    [
        ((0.8, 12.0, 56.0), "not here", "reproduced"),
        ((0.8, 12.0, 63.9), "reproduced", "not here"),
        ((0.8, 12.0, 60.5), "partly", "partly"),
        ((0.8, 17.0, 66.0), "not here", "not here"),
    ],
)
def test_a_gain_vanishes_in_percent_and_grows_in_seconds(full, gone, grown):
    scale = Scale(name="tiny", seeds=3, lengths=(1024, 16384, 65536))
    rows = []
    for length, base, own in zip(scale.lengths, (1.0, 16.0, 64.0), full, strict=True):
        for policy, ttft in ((ROUND_ROBIN, base), (CACHE_LOAD, base), (FULL, own)):
            rows += [row(ttft, room=room, length=length, policy=policy) for room in ROOMS]
    assert vanishing(scale, Table(rows, 1.0)).verdict == gone
    assert growing(scale, Table(rows, 1.0)).verdict == grown


@pytest.mark.parametrize(("full", "verdict"), [(1.7, "reproduced"), (1.97, "partly"), (2.1, "not here")])
def test_a_gain_stays_from_a_named_share_on(full, verdict):
    policies = {FULL: full, CACHE_LOAD: 2.0, ROUND_ROBIN: 2.0}
    rows = [row(ttft, setting=s, policy=p) for s in (TIED, USUAL) for p, ttft in policies.items()]
    assert keeps(TINY, Table(rows, 1.0), (TIED,), "claim", "value", "what").verdict == verdict


@pytest.mark.parametrize(
    ("ttft", "verdict"),
    [
        ((2.0, 1.9, 1.8, 1.7), "reproduced"),
        ((2.0, 1.8, 1.7, 1.9), "partly"),
        ((2.0, 1.9, 2.0, 2.2), "not here"),
    ],
)
def test_counting_in_full_must_be_the_best(ttft, verdict):
    rows = [row(t, rate=r, gamma=g) for r in RATES for g, t in zip(GAMMAS, ttft, strict=True)]
    assert contention(TINY, Table(rows, 1.0)).verdict == verdict


@pytest.mark.parametrize(
    ("ttft", "verdict"), [((1.7, 1.72), "reproduced"), ((1.7, 1.9), "partly"), ((1.7, 2.1), "not here")]
)
def test_gains_of_larger_fleets_may_differ_by_named_points(ttft, verdict):
    scale = Scale(name="tiny", seeds=3, gpus=(GPUS, 128, 256))
    rows = [row(2.0, gpus=gpus, policy=CACHE_LOAD) for gpus in scale.gpus]
    rows += [row(t, gpus=gpus, policy=FULL) for gpus, t in zip(scale.gpus, (1.7, *ttft), strict=True)]
    assert sizes(scale, Table(rows, 1.0)).verdict == verdict


def test_gains_of_larger_fleets_are_not_alike_where_repetitions_leave_it_open():
    """The same mean gain, whose repetitions differ by far more than the points that are allowed."""
    scale = Scale(name="tiny", seeds=3, gpus=(GPUS, 128, 256))
    rows = [row(2.0, gpus=gpus, policy=CACHE_LOAD) for gpus in scale.gpus]
    rows += [row(1.7, gpus=gpus, policy=FULL) for gpus in scale.gpus]
    rows[-1]["ttft"] = [1.5, 1.7, 1.9]
    claim = sizes(scale, Table(rows, 1.0))
    assert claim.verdict == "partly" and claim.interval[0] < -5 < 5 < claim.interval[1]


@pytest.mark.parametrize(("slowest", "verdict"), [(1.0, "reproduced"), (3.0, "not here")])
def test_a_decision_is_quick_below_a_named_time(slowest, verdict):
    rows = [
        {"gpus": gpus, "policy": policy, "trace": "generated conversation", "ms": [ms, ms]}
        for gpus, ms in zip(TINY.gpus, (0.1, slowest), strict=True)
        for policy in (FULL, CACHE_LOAD)
    ]
    assert quick(TINY, Table(rows, 1.0)).verdict == verdict
