"""Claims of NetKV: simulations run and repeat, controls behave; which way a claim falls is not tested."""

import json

import numpy as np
import pytest
from claiming import require_whole

from strop.claims import netkv
from strop.claims.base import Progress, joined
from strop.claims.netkv_bed import (
    CACHE_LOAD,
    LADDER,
    LAYING,
    RATES,
    ROUND_ROBIN,
    STATIC,
    Bed,
    Scale,
    Way,
    fleet,
    lay,
    run,
    serve,
)
from strop.claims.netkv_study import (
    USUAL,
    constant_study,
    decision_study,
    gamma_study,
    parts,
    setting_study,
)
from strop.serve.routing.round_robin import RoundRobin
from strop.serve.traces import generate

TINY = Scale(
    name="tiny", requests=200, seeds=2, lengths=(1024, 16384), alike=20, gpus=(64, 128, 256), timed=20
)
PLAINLY = Progress(lambda what, share: None, 1)


@pytest.fixture(scope="module")
def bed(tmp_path_factory) -> Bed:
    """Generated traces, whatever data the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STROP_DATA", str(tmp_path_factory.mktemp("nothing")))
        return lay(TINY, PLAINLY)


@pytest.fixture(scope="module")
def measured(bed):
    """The tables, and the share done before each measurement."""
    shares: list[float] = []
    expected = LAYING + sum(one.steps for one in parts(TINY))
    progress = Progress(lambda what, share: shares.append(share), expected)
    for _ in range(LAYING):
        progress("laying")
    return joined(one.study(bed, progress) for one in parts(TINY)), shares


def test_every_claim_says_everything(measured):
    found = netkv.verdicts(measured[0], TINY)
    require_whole(found, 17, "netkv", seeds=(TINY.seeds,))
    for claim in found:
        assert (
            "generated conversation" in claim.reason or "of one length" in claim.reason or "ms" in claim.claim
        )


def test_progress_never_goes_back_and_ends_in_time(measured):
    shares = measured[1]
    assert shares == sorted(shares) and shares[0] == 0 and 0.95 < shares[-1] < 1


def test_simulations_repeat_to_the_bit(bed, measured):
    again = setting_study(bed, PLAINLY, USUAL)
    assert again == measured[0]["settings"].where(setting=USUAL)


def test_only_decisions_are_timed():
    assert [one.name for one in parts(TINY) if one.timed] == ["decisions"]


def test_tables_have_what_verdicts_compare(measured):
    tables = measured[0]
    for row in (row for table in tables.values() for row in table.rows):
        assert all(len(v) == TINY.seeds for v in row.values() if isinstance(v, list))
    names = {ROUND_ROBIN, CACHE_LOAD, *LADDER}
    assert all({row["policy"] for row in tables["rates"].where(rate=r)} == names for r in RATES)
    for name in ("rates", "sizes"):
        assert all(min(row["slo"]) >= 0 and max(row["slo"]) <= 1 for row in tables[name].rows)
    assert all(min(row["ttft"]) > min(row["transfer"]) > 0 for row in tables["lengths"].rows)
    assert all(max(row["queue"]) == 0 for row in tables["lengths"].rows), "prompts never wait to be computed"


# What is served.


def test_weights_are_tuned_on_what_is_not_measured(bed):
    whole = generate("conversation", TINY.requests, 0)
    rest = {job.request.id for job in bed.rest[0].jobs}
    assert 0 < len(rest) < len(whole) and min(rest) == len(whole) - len(rest)
    assert set(bed.tuned) == set(RATES)


def test_slices_do_not_overlap(bed):
    whole = Bed([bed.rest[0]] * 3, bed.tuned)
    ids = [job.request.id for one in whole.slices() for job in one.jobs]
    assert len(ids) == len(set(ids)) == len(bed.rest[0].jobs) // 3 * 3
    assert [len(one.jobs) for one in whole.slices(most=5)] == [5, 5, 5]


def test_the_published_trace_is_served_where_it_is_at_hand(tmp_path, monkeypatch):
    folder = tmp_path / "mooncake"
    folder.mkdir()
    lines = [
        {"timestamp": 500 * i, "input_length": 600, "output_length": 5, "hash_ids": [0, i + 1]}
        for i in range(60)
    ]
    (folder / "conversation_trace.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setenv("STROP_DATA", str(tmp_path))
    bed = lay(Scale(name="tiny", requests=50, seeds=2), PLAINLY)
    assert [trace.name for trace in bed.rest] == ["conversation_trace.jsonl"] * 2
    assert max(job.request.id for job in bed.rest[0].jobs) == 49
    row = serve(fleet(), RoundRobin(), bed.slices())
    assert row["trace"].startswith("conversation_trace.jsonl") and row["requests"] == 20


@pytest.mark.parametrize("gpus", [64, 256])
def test_prompts_are_computed_and_decoded_in_the_same_pods_and_other_racks(gpus):
    cluster = fleet(gpus)
    prefill, decode = (np.array([host for host, _ in cluster.of(role)]) for role in ("prefill", "decode"))
    tiers = cluster.network.tier(prefill[:, None], decode[None])
    assert len(prefill) == len(decode) == gpus // 8 and cluster.network.hosts == gpus // 8
    assert np.bincount(tiers.ravel()).tolist() == [0, 0, tiers.size // 4, tiers.size * 3 // 4]


def test_a_fleet_with_room_differs_in_nothing_else():
    usual, roomy = fleet(), fleet(room=2)
    assert [g.kv_tokens for _, g in roomy.of("decode")] == [2 * g.kv_tokens for _, g in usual.of("decode")]
    assert roomy.of("prefill") == usual.of("prefill") and roomy.network == usual.network


def test_prefill_hosts_take_turns_where_asked(bed):
    found = run(fleet(), bed.rest[0], RoundRobin(), 0, Way(in_turn=True)).columns["prefill"]
    counts = np.bincount(found, minlength=8)
    assert counts.max() - counts.min() <= 1


# Controls.


def test_self_contention_that_changes_picks_at_gamma_0_stops_the_experiment(bed, monkeypatch):
    monkeypatch.setitem(LADDER, STATIC, RoundRobin())
    with pytest.raises(RuntimeError, match="control failed: self-contention"):
        gamma_study(bed, PLAINLY, 1.0)


def test_telemetry_whose_age_shows_under_constant_traffic_stops_the_experiment(bed, monkeypatch):
    def differs(cluster, policy, traces):
        return {"ttft": [cluster.telemetry]}

    monkeypatch.setattr("strop.claims.netkv_study.serve", differs)
    with pytest.raises(RuntimeError, match="control failed: telemetry"):
        constant_study(bed, PLAINLY)


def test_timing_changes_no_decision(bed, monkeypatch):
    kept = {}

    def spy(cluster, trace, policy, seed, way):
        kept[policy.of] = run(cluster, trace, policy, seed, way), run(cluster, trace, policy.of, seed, way)
        return kept[policy.of][0]

    monkeypatch.setattr("strop.claims.netkv_study.run", spy)
    rows = decision_study(bed, PLAINLY, Scale(name="tiny", seeds=2, gpus=(64,), timed=20))
    assert all(min(row["ms"]) > 0 for row in rows) and len(kept) == 2
    for timed, plain in kept.values():
        assert timed.columns["decode"].tolist() == plain.columns["decode"].tolist()
