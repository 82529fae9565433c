"""Claims of PSViT and PrimeSVT: experiments run and repeat, controls behave; no hypothesis is tested."""

import dataclasses

import numpy as np
import pytest
import torch
from claiming import SEVERAL, require_whole
from prune_models import spiking
from torch import nn

from strop.claims import primesvt, prune_bed, psvit
from strop.claims.base import Progress, Table, joined
from strop.claims.primesvt_study import MEET, RESERVED, SIZE, SMALLEST, Untied, digit_study
from strop.claims.prune_bed import Answers, Bed, Scale, Subject, halves, lay
from strop.claims.prune_reading import DENSE, above, gap, halved, lost, over, quotient
from strop.claims.prune_study import MASKS, RANDOM, beside, plan_row, planned, unit_rows, ways
from strop.claims.psvit_study import (
    BEFORE,
    COLLAPSED,
    LOT,
    NORM,
    NORMS,
    PSVIT,
    TUNED,
    remembering,
    uniform_study,
)
from strop.core.errors import StropError
from strop.models.spiking_config import SpikingConfig
from strop.prune.baselines import Uniform
from strop.prune.primesvt import PrimeSVT
from strop.prune.psvit import PSViT
from strop.prune.trace import trace
from strop.tasks.digits import Labelled, right

IMAGES = 24
SHAPE = {"pools": "01", "channels": 2, "steps": 2, "classes": 4, "heads": 2}
TINY = Scale(name="tiny", events=("moving",), digits=("still",), splits=2, draws=1, statistics=16, passes=1)
PAPERS_HERE = {"psvit": psvit.PAPER, "primesvt": primesvt.PAPER}
PLAINLY = Progress(lambda what, share: None, 1)


def frames(count: int) -> torch.Tensor:
    return (torch.rand(count, 2, 2, 4, 4) < 0.3).float()


@torch.no_grad()
def subject(name: str, seed: int, times: int) -> Subject:
    """An untrained model whose own answers, of more than one class, are the right ones."""
    torch.manual_seed(seed)
    model = spiking(SpikingConfig.sdt(1, 8, **SHAPE)).eval()
    images = frames(IMAGES * times)
    model.head.bias -= model(images).mean(0)
    data = Labelled(images, model(images).argmax(-1))
    assert len(data.labels.unique()) > 1
    return Subject(name, model, trace(model), Answers(data, times))


def laid() -> Bed:
    subjects = subject("moving", 0, 2), subject("still", 1, 1)
    training = Labelled(frames(80), torch.randint(4, (80,)))
    return Bed({one.name: one for one in subjects}, halves(IMAGES, TINY.splits), training)


@pytest.fixture(scope="module")
def bed() -> Bed:
    return laid()


@pytest.fixture(scope="module")
def measured(bed):
    """By paper, the tables and the share done before each measurement."""
    found = {}
    for name, paper in PAPERS_HERE.items():
        shares: list[float] = []
        parts = paper.parts(TINY)
        steps = sum(one.steps for one in parts)
        progress = Progress(lambda what, share, shares=shares: shares.append(share), steps)
        found[name] = joined(one.study(bed, progress) for one in parts), shares, steps
    return found


@pytest.mark.parametrize(("name", "count"), [("psvit", 12), ("primesvt", 10)])
def test_every_claim_has_a_verdict_and_plain_details(measured, name, count):
    tables, shares, steps = measured[name]
    require_whole(
        PAPERS_HERE[name].verdicts(tables, TINY), count, name, seeds=range(TINY.splits, SEVERAL.stop)
    )
    assert len(shares) == steps and shares == sorted(shares) and max(shares) < 1


def test_experiments_repeat(measured):
    again = laid()
    tables, *_ = measured["psvit"]
    plans, *_ = psvit.PAPER.parts(TINY)
    for name, table in plans.study(again, PLAINLY).items():
        assert table.rows == tables[name].rows
    assert uniform_study(again, PLAINLY, TINY, "still") == tables["uniform"].where(model="still")
    assert digit_study(again, PLAINLY, TINY, "still") == measured["primesvt"][0]["digits"].rows


def test_every_row_has_a_value_for_every_split(measured):
    for tables, *_ in measured.values():
        for row in (row for name in tables if name != "units" for row in tables[name].rows):
            assert len(row["val"]) == len(row["test"]) == TINY.splits
            assert all(0 <= value <= 1 for value in (*row["val"], *row["test"]))


def test_other_ways_save_as_much_but_masks_nothing(measured):
    plans = measured["psvit"][0]["plans"]
    for row in (row for row in plans.rows if "matched" in row):
        assert row["matched"] == pytest.approx(plans.pick("saving", method=PSVIT))
        for saved, asked in zip(row["saving"], row["matched"], strict=True):
            if row["method"] == MASKS:
                assert saved == 0 < asked
            elif row["method"] == RANDOM:
                assert saved == pytest.approx(asked)
            else:
                assert saved >= asked - 1e-9


def test_recovery_tells_every_step_of_every_state_apart(measured):
    recovery = measured["psvit"][0]["recovery"]
    states = {(row["method"], row["step"]) for row in recovery.rows}
    assert states == {(m, s) for m in (DENSE, COLLAPSED, PSVIT) for s in (BEFORE, NORMS, TUNED)}
    assert recovery.pick("test", method=DENSE, step=BEFORE) == [1.0] * TINY.splits
    assert any(row["test"] != [1.0] * TINY.splits for row in recovery.where(step=(NORMS, TUNED)))


def test_steps_are_taken_once_of_equal_models():
    taken: list[nn.Module] = []
    step = remembering(lambda model: taken.append(model) or model)
    torch.manual_seed(0)
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    same = nn.Linear(2, 2)
    same.load_state_dict(one.state_dict())
    assert [step(model) for model in (one, same, other)] == [one, one, other] and len(taken) == 2


# What they are measured on.


def test_halves_part_the_images_anew_each_time():
    splits = halves(30, 3)
    for plan, test in splits:
        assert sorted([*plan.tolist(), *test.tolist()]) == list(range(30)) and len(plan) == 15
    assert len({tuple(split.plan.tolist()) for split in splits}) == 3
    assert halves(30, 2)[1].test.tolist() == splits[1].test.tolist()


def test_remembered_stages_answer_as_the_whole_model_does(monkeypatch):
    monkeypatch.setattr(prune_bed, "REMEMBERED", 2)
    torch.manual_seed(3)
    model = spiking(SpikingConfig.sdt(2, 8, **SHAPE)).eval()
    units, images = trace(model), frames(20)
    answers = Answers(Labelled(images, model(images).argmax(-1)), 2)
    asked = []
    model.stem.register_forward_pre_hook(lambda stem, given: asked.append(stem))
    plan = Uniform().plan_units(units, model)
    stages = [
        [],
        ["blocks.1.mlp"],
        ["blocks.0.mlp"],
        ["blocks.1.mlp", "blocks.0.mlp"],
        ["blocks.0.attention"],
    ]
    for names in stages:
        rows = [row if row.name in names else dataclasses.replace(row, kept=row.width) for row in plan.rows]
        thin = dataclasses.replace(plan, rows=tuple(rows)).apply(model, units)
        before = len(asked)
        for _ in range(2):
            found = answers(thin)
        assert len(asked) - before == (not names) and len(answers._given) <= 2
        assert torch.equal(found, right(thin, answers.data).double().view(-1, 2).mean(1))
        assert torch.equal(answers.on(torch.arange(5))(thin) * torch.ones(()), found[:5].mean().float())


def test_an_image_counts_by_the_share_of_its_recordings(bed):
    one = bed.subjects["moving"]
    wrong = Labelled(one.answers.data.images, one.answers.data.labels.clone())
    wrong.labels[:3] = (wrong.labels[:3] + 1) % 4
    assert Answers(wrong, 2)(one.model)[:3].tolist() == [0.0, 0.5, 1.0]


def test_claims_need_the_models(monkeypatch, tmp_path):
    monkeypatch.setenv("STROP_ZOO", str(tmp_path))
    with pytest.raises(StropError, match="no bundled model is called 'svit-events'"):
        lay(prune_bed.SCALES["cpu"], PLAINLY)


# Controls.


def test_a_plan_that_is_not_what_it_says_stops_the_experiment(bed):
    one = bed.subjects["moving"]
    plans = planned(one, bed.splits, PSViT())
    plan_row(one, bed.splits, PSVIT, plans, 0.03)
    lies = {"accuracy": 0.5, "saving": 0.9}
    for field, value in lies.items():
        with pytest.raises(RuntimeError, match="control failed: PSViT of moving is not what"):
            plan_row(one, bed.splits, PSVIT, [dataclasses.replace(p, **{field: value}) for p in plans], 0.03)
    with pytest.raises(RuntimeError, match="loses more than it may"):
        wasted = planned(one, bed.splits, PSViT(tolerance=0.9))
        plan_row(one, bed.splits, PSVIT, wasted, 0.03)


def test_what_planners_may_cut_first_follows_from_ties_alone(bed):
    one = bed.subjects["moving"]
    for method in (PrimeSVT(mode="maximise"), Untied(mode="maximise")):
        (plan, _) = planned(one, bed.splits, method)
        visited = list(dict.fromkeys(step.what for step in plan.walk))
        sizes = [next(row.parameters for row in plan.rows if row.name == name) for name in visited]
        assert sizes == sorted(sizes, reverse=True)
        rows = unit_rows(one, [plan, plan])
        assert {row["unit"] for row in rows} >= set(visited) and all(len(row["lost"]) == 2 for row in rows)


def test_lots_differ_by_draw(bed):
    one = bed.subjects["moving"]
    plans = planned(one, bed.splits, Uniform(rate=0.5))
    found = [way(one, plans[0]) for way in ways(2)[RANDOM]]
    weights = [model.blocks[0].mlp.fc1.conv.weight for model in found]
    assert weights[0].shape == weights[1].shape and not torch.equal(*weights)
    rows = beside(one, bed.splits, plans, {RANDOM: ways(2)[RANDOM]}, PLAINLY)
    assert [row["draw"] for row in rows] == [0, 1]


# Reading.


def test_intervals_are_wider_than_those_of_independent_repetitions():
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = halved(values)
    reach = 2.7764451 * np.std(values, ddof=1) * np.sqrt(1 / 5 + 1)
    assert found.mean == 3 and found.ends == pytest.approx((3 - reach, 3 + reach))
    assert halved(np.full(4, 2.0)).ends == (2.0, 2.0)


def test_halves_of_the_same_images_are_covered():
    """The mean of 600 drawn answers lies within the interval about as often as it says."""
    draw, hits = np.random.default_rng(0), 0
    for _ in range(300):
        pool = draw.random(600) < 0.8
        means = np.array([pool[draw.permutation(600)[:300]].mean() for _ in range(5)])
        low, high = halved(means).ends
        hits += low <= 0.8 <= high
    assert 0.9 <= hits / 300 <= 0.99


def table(**savings: tuple[float, ...]) -> Table:
    rows = [
        {"model": "moving", "method": name.replace("_", " "), "saving": list(values), "test": list(values)}
        for name, values in savings.items()
    ]
    return Table(rows, 0.0)


def test_gaps_quotients_and_losses_by_hand():
    made = table(a=(0.3, 0.5), b=(0.2, 0.2), dense=(0.9, 0.9))
    assert gap(made, ["moving"], "saving", "a", "b").whole.mean == pytest.approx(20)
    assert quotient(made, ["moving"], "saving", "a", "b").whole.mean == pytest.approx(2)
    assert lost(made, ["moving"], "a").means == pytest.approx([50])


@pytest.mark.parametrize(
    ("one", "two", "verdict"),
    [((2, 2), (3, 3), "reproduced"), ((2, 2), (-1, -1), "partly"), ((1, -2), (0, 0), "not here")],
)
def test_a_measure_is_above_where_all_intervals_are(one, two, verdict):
    assert above(over("ab", {"a": np.array(one), "b": np.array(two)}.get), 0.0) == verdict


@pytest.mark.parametrize(("saved", "verdict"), [(0.3, "reproduced"), (0.2, "not here")])
def test_largest_first_is_judged_by_the_ratio(saved, verdict):
    savings = {SIZE: saved, SMALLEST: 0.2, RESERVED: 0.25}
    rows = [{"model": "moving", "method": name, "saving": [value] * 2} for name, value in savings.items()]
    made = Table(rows, 0.0)
    assert primesvt.largest(TINY, made).verdict == verdict
    assert primesvt.reserves(TINY, made).verdict == ("not here" if saved > 0.25 else "reproduced")


def test_a_plan_that_is_not_feasible_is_not_a_reproduction(measured):
    policies = measured["primesvt"][0]["policies"]
    for answers, verdict in (
        ([True] * 2, "reproduced"),
        ([True, False], "partly"),
        ([False] * 2, "not here"),
    ):
        rows = [r | {"feasible": answers} if r["method"] == MEET else r for r in policies.rows]
        assert primesvt.meets(TINY, Table(rows, 0.0)).verdict == verdict


def test_norms_are_judged_by_both_kinds_of_model():
    def made(rescued: float, harmed: float) -> Table:
        gains = {COLLAPSED: rescued, PSVIT: harmed, DENSE: 0.0}
        rows = [
            {"model": "moving", "method": state, "step": step, "test": [0.5 + (step == NORMS) * gain] * 2}
            for state, gain in gains.items()
            for step in (BEFORE, NORMS)
        ]
        return Table(rows, 0.0)

    for told, verdict in (((0.3, -0.1), "reproduced"), ((0.3, 0.1), "partly"), ((-0.1, 0.1), "not here")):
        assert psvit.norms(TINY, made(*told)).verdict == verdict


def test_norm_and_lot_cut_as_many_channels(measured):
    uniform = measured["psvit"][0]["uniform"]
    for row in uniform.where(channels=NORM):
        same = {key: row[key] for key in ("model", "method", "rate", "saving")}
        assert len(uniform.where(channels=LOT, **same)) == TINY.draws
