"""Claims of E2LLM: plans and simulations run and repeat, controls behave; no hypothesis is tested."""

import json

import numpy as np
import pytest

from strop.claims import PAPERS, e2llm, e2llm_bed, e2llm_study
from strop.claims.base import VERDICTS, Progress, Table, joined
from strop.claims.e2llm import bears_tails, near_optimum, unconstrained
from strop.claims.e2llm_bed import (
    E2LLM,
    FREE,
    LAN,
    LAYING,
    LENDING,
    LENGTHS,
    MIXED,
    PERIODS,
    PLANNERS,
    SPLITWISE,
    TOLD,
    UNBOUND,
    Lengths,
    Scale,
    drawn,
    lay,
    predicted,
    random_devices,
    serve,
    waiting,
)
from strop.claims.e2llm_study import GENETIC, MEANS, TRACES, parts, search_study, tail_study
from strop.claims.e2llm_waiting import (
    CELLS,
    decodes_faster,
    disaggregates,
    halves,
    keeps_speed,
    waits_less,
    waits_less_than_lending,
)
from strop.core.errors import StropError
from strop.serve.plan import Workload

TINY = Scale(name="tiny", instances=2, devices=4, seeds=2, requests=20, sampled=60)
PLAINLY = Progress(lambda what, share: None, 1)


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """Short generated traces, whatever data the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STROP_DATA", str(tmp_path_factory.mktemp("nothing")))
        patch.setattr(e2llm_study, "MADE_UP", 200)
        patch.setattr(e2llm_study, "CONTROL", 0.2)  # a run this short hardly fills its places
        yield


@pytest.fixture(scope="module")
def bed(patched):
    return lay(TINY, PLAINLY)


@pytest.fixture(scope="module")
def measured(bed):
    """The tables, and the share done before each measurement."""
    shares: list[float] = []
    expected = LAYING + sum(one.steps for one in parts(TINY))
    progress = Progress(lambda what, share: shares.append(share), expected)
    lay(TINY, progress)
    return joined(one.study(bed, progress) for one in parts(TINY)), shares


def test_every_claim_has_a_verdict_and_plain_details(measured):
    tables, shares = measured
    found = e2llm.verdicts(tables, TINY)
    assert len(found) == 9 and all(claim.paper == "e2llm" in PAPERS for claim in found)
    assert all(claim.verdict in VERDICTS and claim.scale == "tiny" for claim in found)
    json.dumps([claim.to_dict() for claim in found])
    assert len(shares) == LAYING + sum(one.steps for one in parts(TINY)) and max(shares) < 1


def test_experiments_repeat(bed, measured):
    tables, _ = measured
    assert search_study(bed, PLAINLY, TINY) == tables["search"].rows
    name = next(iter(TRACES))
    assert tail_study(bed, PLAINLY, TINY, name) == tables["tails"].where(trace=name)


def test_every_plan_is_served_at_every_period(measured):
    tables, _ = measured
    cells = {(row["data"], row["plan"], row["period"]) for row in tables["waiting"].rows}
    assert cells == {(data, plan, p) for data in LENGTHS for plan in (*PLANNERS, *TOLD) for p in PERIODS}
    for row in tables["waiting"].rows:
        assert len(row["wait"]) == TINY.seeds and min(row["wait"]) >= 0
        assert np.all(np.array(row["total"]) > row["wait"])


def test_the_papers_plans_hold_every_block_and_run_as_told(bed):
    for name, sets in TOLD.items():
        for data, replicas in sets.items():
            plan = bed.told(name, data)
            assert sorted(one.concurrency for one in plan.replicas) == sorted(one[0] for one in replicas)
            assert all(sum(stage.blocks for stage in one.stages) == plan.blocks for one in plan.replicas)
            assert plan.phase == pytest.approx(predicted(plan, Workload(*LENGTHS[data])))
            assert all(one.speed > 0 for one in plan.replicas)


def test_a_plan_predicts_its_own_phase_for_the_means_it_was_made_for(bed):
    size = Workload(*LENGTHS["extended"])
    plan = bed.plan(E2LLM, size)
    assert predicted(plan, size) == pytest.approx(plan.phase)
    assert predicted(plan, Workload(size.prompt, 10 * size.output)) > 5 * plan.phase


def test_lengths_have_the_means_that_they_are_drawn_for():
    lengths = drawn("custom", 4000, 1)
    assert lengths.workload.prompt == pytest.approx(LENGTHS["custom"][0], rel=0.03)
    assert lengths.workload.output == pytest.approx(LENGTHS["custom"][1], rel=0.03)
    assert lengths.prompt.std() / lengths.prompt.mean() == pytest.approx(e2llm_bed.CV, rel=0.05)
    jobs = lengths.trace("t", 0.5).jobs
    assert jobs[7].arrival == 3.5 and jobs[7].request.prompt == lengths.prompt[7]


def test_random_devices_differ_and_offload_where_they_may(bed):
    devices = random_devices(np.random.default_rng(0), bed.devices, 12)
    assert len({device.memory for device in devices}) == 12
    assert any(device.offload for device in devices) and not all(device.offload for device in devices)


def test_a_prediction_that_fails_on_equal_requests_stops_the_experiment(bed, monkeypatch):
    monkeypatch.setattr(e2llm_study, "predicted", lambda plan, size: 2 * predicted(plan, size))
    with pytest.raises(RuntimeError, match="control failed"):
        tail_study(bed, PLAINLY, TINY, "Azure conv")


def test_claims_need_the_devices(monkeypatch, tmp_path):
    monkeypatch.setattr(e2llm_bed, "EDGE", tmp_path / "none.yaml")
    with pytest.raises(StropError, match="run them in a checkout"):
        lay(TINY, PLAINLY)


def searched(genetic: list[float], splitwise: float = 2.0) -> Table:
    rows = [{E2LLM: 1.0, GENETIC: one, SPLITWISE: splitwise, MIXED: 1.1} for one in genetic]
    return Table(rows, 0.0)


def served(wait: dict[str, float], rate: float = 20.0, phase: dict[str, float] | None = None) -> Table:
    """The same waiting in all cells, by plan, and 10 s of it otherwise."""
    rows = []
    for data, period in CELLS:
        for plan in (*PLANNERS, *TOLD):
            seconds = [wait.get(plan, 10.0)] * 2
            row = {"data": data, "plan": plan, "period": period, "phase": (phase or {}).get(plan, 2.0)}
            rates = {name: [rate] * 2 for name in ("rate", "p10", "p50")}
            rows.append(row | {"wait": seconds, "total": seconds} | rates)
    return Table(rows, 0.0)


def test_a_search_is_judged_by_how_often_it_is_near():
    assert near_optimum(TINY, searched([1.0, 1.0, 1.02])).verdict == "reproduced"
    assert near_optimum(TINY, searched([1.02] * 3)).verdict == "partly"
    assert near_optimum(TINY, searched([1.2] * 3)).verdict == "not here"


def test_a_condition_is_judged_on_the_seven_devices():
    for phase, verdict in ((2.3, "reproduced"), (2.1, "not here")):
        runs = served({}, phase={SPLITWISE: phase})
        assert unconstrained(TINY, searched([1.0]), runs).verdict == verdict
    assert "(by construction)" in unconstrained(TINY, searched([1.0]), served({})).claim


def test_waiting_is_judged_in_every_cell():
    for wait, verdict in ((5.0, "reproduced"), (7.0, "partly"), (9.0, "partly"), (11.0, "not here")):
        assert waits_less(TINY, served({E2LLM: wait})).verdict == verdict
    table = served({E2LLM: 5.0})
    for row in table.where(plan=E2LLM, data="custom", period=PERIODS[-1]):
        row["wait"] = [20.0, 20.0]
    assert waits_less(TINY, table).verdict == "partly"


@pytest.mark.parametrize(
    ("short", "verdict"), [(8, "reproduced"), (5, "partly"), (4, "not here"), (1, "not here")]
)
def test_half_the_waiting_must_be_seen_in_most_cells_and_is_told_of_the_median_one(short, verdict):
    table = served({})
    for place, (data, period) in enumerate(CELLS):
        (row,) = table.where(plan=E2LLM, data=data, period=period)
        row["wait"] = [4.0 if place < short else 9.0] * 2
    claim = halves(TINY, table)
    median, worst = 0.4 if short > 4 else 0.9, 0.4 if short == 8 else 0.9
    assert claim.verdict == verdict and claim.interval == pytest.approx((median, median))
    assert f" {median:.2f} in the median cell (" in claim.measured
    assert f" {worst:.2f} in the worst (" in claim.measured


@pytest.mark.parametrize(("ahead", "verdict"), [(8, "reproduced"), (5, "partly"), (4, "not here")])
def test_splitwise_that_lends_is_judged_by_waiting_in_every_cell(ahead, verdict):
    table = served({SPLITWISE: 40.0})
    for data, period in CELLS[:ahead]:
        table.where(plan=LENDING, data=data, period=period)[0]["wait"] = [20.0, 20.0]
    claim = waits_less_than_lending(TINY, table)
    assert claim.verdict == verdict and claim.interval == pytest.approx((0.5, 0.5))
    assert f"under {LENDING}, within the plan's places" in claim.claim


def test_splitwise_that_lends_runs_on_the_replicas_of_the_adapted_one(bed, measured):
    size = Workload(*LENGTHS["extended"])
    assert bed.plan(LENDING, size) == bed.plan(SPLITWISE, size)
    rows = [measured[0]["waiting"].where(plan=plan, period=PERIODS[0]) for plan in (LENDING, SPLITWISE)]
    assert all(one["replicas"] == other["replicas"] for one, other in zip(*rows, strict=True))
    assert any(one["wait"] != other["wait"] for one, other in zip(*rows, strict=True))


def test_by_memory_alone_more_decode_at_once_and_none_waits_for_a_place(bed):
    size = Workload(*LENGTHS["extended"])
    made = drawn("extended", 60, 0).trace("t", 0.5)
    bound, free = (serve(bed.plan(name, size), made, name=name) for name in (LENDING, UNBOUND))
    assert free.spans[:, 3].max() > 2 * bound.spans[:, 3].max()
    assert waiting(free).mean() < waiting(bound).mean() and free.gap() > bound.gap()


@pytest.mark.parametrize(("ahead", "verdict"), [(8, "reproduced"), (5, "partly"), (4, "not here")])
def test_decoding_is_partly_faster_where_it_is_in_most_cells(ahead, verdict):
    table = served({})
    for data, period in CELLS[:ahead]:
        table.where(plan=E2LLM, data=data, period=period)[0]["rate"] = [30.0, 30.0]
    assert decodes_faster(TINY, table).verdict == verdict


def test_the_least_speed_is_judged_by_medians():
    assert keeps_speed(TINY, served({}, rate=16.0)).verdict == "reproduced"
    assert keeps_speed(TINY, served({}, rate=14.0)).verdict == "not here"


def test_disaggregation_is_judged_by_prediction_and_simulation():
    search = searched([1.0])
    longer = {MIXED: 2.5}
    assert disaggregates(TINY, search, served({MIXED: 12.0}, phase=longer)).verdict == "reproduced"
    assert disaggregates(TINY, search, served({MIXED: 12.0})).verdict == "partly"
    assert disaggregates(TINY, search, served({MIXED: 8.0}, phase=longer)).verdict == "not here"


def test_tails_are_judged_on_the_plans_network():
    def table(error: float) -> Table:
        head = {"published": False, "fits": 1.0, "phase": [1.0, 1.0], "wait": [1.0, 1.0]}
        rows = [
            head
            | {"trace": name, "lengths": lengths, "network": network}
            | {"simulated": [1 + error * (network == LAN)] * 2}
            for name in TRACES
            for lengths in (name, MEANS)
            for network in (LAN, FREE)
        ]
        return Table(rows, 0.0)

    for error, verdict in ((0.05, "reproduced"), (-0.2, "partly"), (0.5, "not here")):
        assert bears_tails(TINY, table(error)).verdict == verdict


def test_equal_requests_take_the_predicted_phase_on_a_free_network(bed):
    plan = bed.plan(E2LLM, Workload(*LENGTHS["extended"]))
    alike = Lengths(*(np.full(600, tokens) for tokens in LENGTHS["extended"]))
    found = e2llm_study._tails(plan, [alike], FREE)
    assert found["simulated"][0] == pytest.approx(plan.phase, rel=0.02)
    assert found["wait"][0] < 0.1
