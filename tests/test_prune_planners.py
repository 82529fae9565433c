"""Planners without a trained model: scripted accuracies against maps worked out by hand."""

import math
import random
import re

import pytest
import torch
from pruning import UNITS, WIDTHS, A, B, C, Net, Scripted, unit

from strop.core.errors import StropError
from strop.prune.primesvt import PrimeSVT
from strop.prune.psvit import PSViT
from strop.prune.search import Candidate, frontier

NET = Net().eval()
MILD = {A: 0.02, B: 0.05, C: 0.5}
"""What the whole width of a unit costs: C is sensitive."""
PLANNERS = [PSViT(), PrimeSVT(), PrimeSVT(saving=0.6), PrimeSVT(mode="maximise", order="random", reserve=0.5)]
NAMES = ["psvit", "meet", "infeasible", "maximise"]


def planned(method, slopes=MILD, table=None, **script):
    return method.plan_units(UNITS, NET, Scripted(slopes, table, **script))


def kept(plan):
    return tuple(plan.counts[name] for name in (A, B, C))


def steps(plan):
    return [(step.what, step.rate, step.accepted) for step in plan.walk]


def verdicts(plan):
    return {row.name: row.verdict for row in plan.rows}


def test_psvit_raises_the_robust_units_from_the_rate_that_all_blocks_tolerate():
    evaluate = Scripted(MILD)
    plan = PSViT().plan_units(UNITS, NET, evaluate)
    assert steps(plan) == [(A, 0.5, True), (A, 0.6, False), (B, 0.5, False), (C, 0.1, False)]
    assert kept(plan) == (10, 6, 10) and plan.saving == 0.28 and plan.feasible
    assert plan.accuracy == pytest.approx(0.87) and plan.dense_accuracy == 0.9
    assert [verdicts(plan)[name] for name in (A, B, C)] == ["robust", "moderate", "sensitive"]
    assert len(plan.curves) == 18 and len(plan.sensitivity) == 9
    assert plan.evaluations == len(evaluate.seen) == len(set(evaluate.seen)) == 31


def test_psvit_takes_the_largest_tolerated_rate_even_behind_one_that_is_not():
    plan = planned(PSViT(), {A: 0.02, B: 0.02, C: 0.5}, {(0.3, 0.3, 0.0): 0.05})
    accepted = [one.rate for one in plan.curves if one.what == "blocks" and one.accepted]
    assert accepted == [0.1, 0.2, 0.4, 0.5, 0.6, 0.7]
    assert steps(plan) == [(A, 0.8, True), (A, 0.9, False), (B, 0.8, False), (C, 0.1, False)]
    assert kept(plan) == (4, 3, 10)


def test_psvit_leaves_sensitive_blocks_whole_at_first():
    plan = planned(PSViT(), {A: 0.02, B: 0.02, C: 0.5}, {(0.0, 0.3, 0.0): 0.04})
    assert verdicts(plan)[B] == "sensitive"
    assert [step for step in steps(plan) if step[0] == B] == [
        (B, rate, rate < 0.7) for rate in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    ]
    assert kept(plan) == (2, 4, 10)


def test_psvit_starts_uniform_where_sparing_the_sensitive_is_not_tolerated():
    plan = planned(PSViT(), {A: 0.02, B: 0.02, C: 0.5}, {(0.0, 0.3, 0.0): 0.04, (0.7, 0.0, 0.0): 0.05})
    assert verdicts(plan)[B] == "sensitive"
    assert kept(plan) == (4, 3, 10) and plan.accuracy == pytest.approx(0.87)


def test_psvit_stops_at_the_saving_that_is_enough_or_says_that_it_is_out_of_reach():
    plan = planned(PSViT(saving=0.1))
    assert plan.saving == 0.12 and plan.feasible and not plan.walk
    far = planned(PSViT(saving=0.9))
    assert not far.feasible and kept(far) == kept(planned(PSViT())) and far.candidates


def test_no_unit_falls_below_psvits_floor():
    assert kept(planned(PSViT(), {})) == (2, 1, 1)
    evaluate = Scripted({})
    plan = PSViT(floor=0.25).plan_units(UNITS, NET, evaluate)
    assert kept(plan) == (6, 3, 3) and plan.saving == pytest.approx(0.56)
    assert max(max(rates) for rates in evaluate.seen) == 0.75
    eights = PSViT(round_to=8).search(UNITS, NET)
    units = [unit("wide", width, ("w", 0, "producer")) for width in (256, 64, 12, 5)]
    assert [eights.count(one, 0.9) for one in units] == [32, 8, 8, 5]


def test_primesvt_takes_the_last_unit_back_to_what_still_meets_the_saving():
    evaluate = Scripted(MILD)
    plan = PrimeSVT().plan_units(UNITS, NET, evaluate)
    assert steps(plan) == [(A, 0.9, True), (A, 0.7, True)]
    assert kept(plan) == (6, 10, 10) and plan.saving == 0.28 and plan.feasible
    assert plan.evaluations == len(evaluate.seen) == 28
    assert [one.rate for one in plan.sensitivity if one.what == C and one.accepted] == []
    assert verdicts(plan)[B] == "target" and "tolerates no rate" in verdicts(plan)[C]


def test_primesvt_saves_no_more_than_asked_at_equal_accuracy():
    assert kept(planned(PrimeSVT(), {C: 0.5})) == (6, 10, 10)


def test_primesvt_out_of_reach_gives_the_most_that_is_tolerated():
    plan = planned(PrimeSVT(saving=0.6))
    scan = [(B, rate, rate == 0.2) for rate in (0.6, 0.5, 0.4, 0.3, 0.2)]
    assert steps(plan) == [(A, 0.9, True), *scan]
    assert kept(plan) == (2, 8, 10) and plan.saving == 0.4 and not plan.feasible
    assert plan.accuracy == pytest.approx(0.872)


def test_primesvt_without_any_target_gives_the_dense_model():
    plan = planned(PrimeSVT(), {A: 1.0, B: 1.0, C: 1.0})
    assert plan.counts == {unit.name: unit.width for unit in UNITS.units}
    assert not plan.feasible and plan.saving == 0 and plan.candidates[0].saving == 0


@pytest.mark.parametrize(
    ("four", "expected"), [(0.015, (2, 6, 10)), (0.025, (2, 5, 10))], ids=["walked back", "not at a loss"]
)
def test_primesvt_scans_past_rates_that_fail(four, expected):
    table = {(0.4, 0, 0): 0.05, (0.9, 0.5, 0): 0.02, (0.9, 0.2, 0): 0.05, (0.9, 0.4, 0): four}
    plan = planned(PrimeSVT(saving=0.4), MILD, table)
    back = [(B, 0.2, False), (B, 0.3, False), (B, 0.4, True)]
    assert steps(plan) == [(A, 0.9, True), (B, 0.6, False), (B, 0.5, True), *back]
    assert kept(plan) == expected and plan.feasible


def test_primesvt_maximises_beyond_the_saving():
    plan = planned(PrimeSVT(mode="maximise"))
    assert kept(plan) == (2, 8, 10) and plan.feasible


def test_a_reserve_keeps_tolerance_for_the_units_to_come():
    slopes = {A: 0.03, B: 0.05, C: 0.5}
    greedy = planned(PrimeSVT(mode="maximise"), slopes)
    assert kept(greedy) == (2, 10, 10)
    spared = planned(PrimeSVT(mode="maximise", reserve=0.5), slopes)
    assert kept(spared) == (4, 9, 10) and steps(spared)[:2] == [(A, 0.9, False), (A, 0.8, True)]


def visited(plan):
    return list(dict.fromkeys(step.what for step in plan.walk))


@pytest.mark.parametrize(
    ("order", "expected"),
    [("size", [A, C, B]), ("benefit", [A, C, B]), ("robust", [C, B, A]), ("smallest", [C, B, A])],
)
def test_orders_with_ties_in_size_by_robustness(order, expected):
    plan = planned(PrimeSVT(mode="maximise", order=order), {A: 0.2, B: 0.05, C: 0.03})
    assert visited(plan) == expected
    sizes = {row.name: row.parameters for row in plan.rows}
    assert sizes == {"stem.0": 150, C: 200, "stream": 850, A: 400, B: 200}


@pytest.mark.parametrize(("order", "expected"), [("size", [A, B, C]), ("smallest", [B, C, A])])
def test_of_equal_sizes_the_more_robust_comes_before_the_earlier(order, expected):
    plan = planned(PrimeSVT(mode="maximise", order=order), {A: 0.2, B: 0.03, C: 0.05})
    assert visited(plan) == expected


def test_a_full_tie_falls_to_network_order_and_lots_to_the_seed():
    even = {A: 0.03, B: 0.03, C: 0.03}
    assert visited(planned(PrimeSVT(mode="maximise"), even)) == [A, C, B]
    drawn = [visited(planned(PrimeSVT(mode="maximise", order="random", seed=k), even)) for k in range(8)]
    assert all(sorted(one) == sorted(WIDTHS) for one in drawn) and len(set(map(tuple, drawn))) > 1


def test_units_that_save_too_little_are_listed_and_never_tried():
    evaluate = Scripted({A: 0.07})
    plan = PrimeSVT(least=0.2).plan_units(UNITS, NET, evaluate)
    assert all(key[1:] == (0.0, 0.0) for key in evaluate.seen)
    assert re.fullmatch(r"saves 16.0.% within the tolerance, below 20.%", verdicts(plan)[A])
    assert re.fullmatch(r"saves 18.0.% at most, below 20.%", verdicts(plan)[B])


@pytest.mark.parametrize("method", PLANNERS, ids=NAMES)
def test_streams_and_what_reads_the_input_stay_whole_and_say_why(method):
    plan = planned(method)
    assert plan.counts["stem.0"] == plan.counts["stream"] == 10
    assert "residual stream" in verdicts(plan)["stream"] and "input" in verdicts(plan)["stem.0"]
    assert plan.frozen == UNITS.frozen


@pytest.mark.parametrize("method", PLANNERS, ids=NAMES)
def test_planning_changes_nothing_and_comes_out_the_same_again(method):
    net = Net().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    noted = []
    evaluate = Scripted(MILD)
    first = method.plan_units(
        UNITS, net, lambda m: evaluate(m) if not m.training else math.nan, lambda *said: noted.append(said)
    )
    assert method.plan_units(UNITS, net, Scripted(MILD)) == first
    assert net.training and all(module.training for module in net.modules())
    after = net.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(0 <= share <= 1 for _, share in noted) and noted[-1][1] == 1


@pytest.mark.parametrize("method", PLANNERS, ids=NAMES)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.1, 97.0, None, "high", torch.ones(2)])
def test_an_accuracy_that_is_none_is_refused(method, wrong):
    with pytest.raises(StropError, match="accuracy from 0 to 1"):
        planned(method, change=lambda accuracy: accuracy if accuracy == 0.9 else wrong)


@pytest.mark.parametrize("method", PLANNERS, ids=NAMES)
def test_without_evaluate_planners_say_what_is_missing(method):
    with pytest.raises(StropError, match="give it `evaluate`"):
        method.plan_units(UNITS, NET)


@pytest.mark.parametrize("method", PLANNERS, ids=NAMES)
def test_a_dense_model_that_knows_nothing_is_refused(method):
    with pytest.raises(StropError, match="right on nothing"):
        planned(method, {}, dense=0.0)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (PSViT, {"tolerance": 3.0}, "as 0.03 for 3 %"),
        (PSViT, {"tolerance": math.nan}, "share from 0 to 1"),
        (PSViT, {"saving": 25.0}, "share from 0 to 1"),
        (PSViT, {"probe": (0.3,)}, "2 or more rising rates"),
        (PSViT, {"probe": (0.6, 0.3)}, "rising"),
        (PSViT, {"step": 0.0}, "within"),
        (PSViT, {"step": 0.6, "floor": 0.5}, "lower one of them"),
        (PrimeSVT, {"epsilon": 1.01}, "share from 0 to 1"),
        (PrimeSVT, {"reserve": -0.1}, "share from 0 to 1"),
        (PrimeSVT, {"rates": ()}, "1 or more rising rates"),
        (PrimeSVT, {"rates": (0.5, 1.0)}, "within"),
        (PrimeSVT, {"mode": "met"}, "one of meet, maximise"),
        (PrimeSVT, {"order": "largest"}, "one of size, benefit"),
        (PrimeSVT, {"round_to": 0}, "1 or more"),
    ],
)
def test_settings_that_are_none_are_refused(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        kind(**settings)


def test_an_unknown_score_is_named():
    with pytest.raises(StropError, match="unknown score 'l1'; known: l2, random"):
        PSViT(score="l1")


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("method", [*PLANNERS, PSViT(saving=0.3)])
def test_whatever_the_accuracies_a_plan_keeps_its_word(method, seed):
    draw = random.Random(seed)
    grid = [k / 20 for k in range(20)]
    noise = {(a, b, c): 0.06 * draw.random() ** 2 for a in grid for b in grid for c in grid}
    noise[0.0, 0.0, 0.0] = 0.0
    plan = planned(method, table=noise)
    allowed = method.tolerance if isinstance(method, PSViT) else method.epsilon
    assert plan.dense_accuracy - plan.accuracy <= allowed + 1e-9
    assert plan.feasible == (plan.saving >= (method.saving or 0.0))
    assert plan.candidates and not any(
        one.accuracy >= two.accuracy and one.saving >= two.saving
        for one in plan.candidates
        for two in plan.candidates
        if one != two
    )
    left = sum(parameter.numel() for parameter in plan.apply(NET, UNITS).parameters())
    assert 1 - left / 1000 == pytest.approx(plan.saving, abs=1e-9)


def test_the_frontier_drops_what_another_beats_and_keeps_one_of_equals():
    points = [(0.9, 0.0), (0.9, 0.2), (0.8, 0.2), (0.7, 0.5), (0.7, 0.5), (0.6, 0.4)]
    tried = [Candidate((k,), *point) for k, point in enumerate(points)]
    assert [one.kept for one in frontier(tried)] == [(1,), (3,)]
