"""Scores with known answers, and the baselines that planners are held against."""

import math
from collections import Counter

import pytest
import torch
from pruning import UNITS, A, B, C, Net, Scripted, unit
from torch import nn

from strop.core.errors import StropError
from strop.prune.baselines import GlobalRanking, Uniform, magnitude_masked
from strop.prune.score import by_name, keep, kept_count, l2
from strop.prune.units import Axis, Unit, Units

NET = Net().eval()


@pytest.mark.parametrize(
    ("width", "rate", "heads", "round_to", "expected"),
    [
        (20, 0.0, 1, 1, 20),
        (20, 0.3, 1, 1, 14),
        (10, 0.25, 1, 1, 8),  # round(7.5)
        (10, 0.35, 1, 1, 6),  # round(6.5)
        (10, 0.99, 1, 1, 1),
        (32, 0.3, 1, 8, 24),  # 22.4
        (32, 0.9, 1, 8, 8),
        (10, 0.0, 1, 8, 10),
        (10, 0.1, 1, 8, 8),
        (13, 0.01, 1, 8, 13),  # 16 is more than there are
        (5, 0.5, 1, 8, 5),
        (24, 0.3, 4, 1, 16),  # round(4.2) of 6 in each
        (24, 0.9, 4, 1, 4),
        (64, 0.3, 4, 8, 32),  # 11.2 of 16 in each
    ],
)
def test_kept_counts_by_hand(width, rate, heads, round_to, expected):
    assert kept_count(width, rate, heads, round_to) == expected


def test_kept_counts_never_rise_with_the_rate():
    for width, heads, round_to in [(1, 1, 1), (17, 1, 1), (48, 6, 3), (40, 2, 8)]:
        counts = [kept_count(width, rate / 100, heads, round_to) for rate in range(100)]
        assert counts == sorted(counts, reverse=True) and counts[0] == width and counts[-1] >= heads
        assert all(count % heads == 0 for count in counts)


def test_keep_takes_the_best_in_order_and_the_first_of_equals():
    scores = torch.tensor([3.0, 1.0, 2.0, 3.0, 2.0, 0.0])
    assert keep(scores, 4).tolist() == [0, 2, 3, 4]
    assert keep(scores, 3).tolist() == [0, 2, 3]
    assert keep(scores, 4, heads=2).tolist() == [0, 2, 3, 4]
    assert keep(torch.arange(1000) % 2, 20).tolist() == [*range(1, 40, 2)]
    assert keep(torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 3.0]), 2, heads=2).tolist() == [0, 5]


class Fused(nn.Module):
    """Queries, keys and values of 2 heads of 3 in one matrix, a bias, and a norm."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(2, 18), nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(18)


def test_l2_adds_squares_of_all_producers_by_head_and_nothing_else():
    model = Fused()
    axes = (
        Axis("qkv.weight", 0, (3, 2, 3), (1, 2), "producer"),
        Axis("qkv.bias", 0, (3, 2, 3), (1, 2), "tied"),
        Axis("norm.weight", 0, (3, 2, 3), (1, 2), "tied"),
        Axis("out.weight", 1, (2, 3), (0, 1), "consumer"),
    )
    fused = Unit(name="qkv", width=6, heads=2, kind="inner", where="block", first=False, axes=axes)
    weight = model.qkv.weight.detach().double()
    by_hand = [
        math.sqrt(sum(float(weight[part * 6 + channel].square().sum()) for part in range(3)))
        for channel in range(6)
    ]
    assert l2(model, fused).tolist() == pytest.approx(by_hand)
    swapped = Axis("qkv.weight", 0, (3, 3, 2), (2, 1), "producer")
    other = Unit(name="qkv", width=6, heads=2, kind="inner", where="block", first=False, axes=(swapped,))
    parts = weight.square().sum(1).reshape(3, 3, 2).sum(0)
    assert l2(model, other).tolist() == pytest.approx(parts.T.flatten().sqrt().tolist())
    columns = Axis("out.weight", 1, (6,), (0,), "producer")
    plain = Unit(name="out", width=6, heads=1, kind="inner", where="block", first=False, axes=(columns,))
    assert l2(model, plain).tolist() == pytest.approx(model.out.weight.detach().norm(dim=0).tolist())


def test_lots_depend_on_seed_and_unit_alone():
    first, second = unit("a", 50), unit("b", 50)
    draws = {
        (seed, one.name): by_name("random", seed)(NET, one) for seed in (0, 1) for one in (first, second)
    }
    assert len({tuple(scores.tolist()) for scores in draws.values()}) == 4
    assert torch.equal(draws[0, "a"], by_name("random", 0)(NET, first))


def test_uniform_cuts_blocks_or_all_and_evaluates_only_what_it_gives():
    plan = Uniform(rate=0.3).plan_units(UNITS, NET)
    assert (plan.counts[A], plan.counts[B], plan.counts[C]) == (14, 7, 10)
    evaluate = Scripted({A: 0.1})
    plan = Uniform(rate=0.3, where="all").plan_units(UNITS, NET, evaluate)
    assert (plan.counts[A], plan.counts[B], plan.counts[C]) == (14, 7, 7)
    assert evaluate.seen == [(0.0, 0.0, 0.0), (0.3, 0.3, 0.3)] and plan.accuracy == pytest.approx(0.87)


@pytest.mark.parametrize(("where", "most"), [("blocks", 0.56), ("all", 0.74)])
def test_uniform_at_a_matched_saving_is_the_smallest_rate_that_saves_it(where, most):
    for saving in (0.05, 0.125, 0.28, 0.5):
        method = Uniform(where=where).matching(saving, UNITS, NET)
        assert method.plan_units(UNITS, NET).saving >= saving
        less = Uniform(where=where, rate=method.rate - 0.001)
        assert less.plan_units(UNITS, NET).saving < saving
    with pytest.raises(StropError, match=rf"{100 * most:.1f}.% is the most"):
        Uniform(where=where).matching(0.95, UNITS, NET)


def test_uniform_where_there_are_no_blocks_says_what_to_do():
    stem = Units(units=UNITS.units[:2], frozen=())
    with pytest.raises(StropError, match='use where="all"'):
        Uniform().plan_units(stem, NET)
    with pytest.raises(StropError, match=r"no channels of this Net can be cut: stem\.0 reads the input"):
        Uniform(where="all").plan_units(Units(units=UNITS.units[:1], frozen=()), NET)
    with pytest.raises(StropError, match="can be cut: x: because"):
        Uniform(where="all").plan_units(Units(units=(), frozen=(("x", "because"),)), NET)


def test_one_ranking_drops_the_least_channels_of_all_units():
    plan = GlobalRanking(saving=0.25).plan_units(UNITS, NET)
    assert plan.saving == 0.26  # 13 channels of 2 %
    ranked = sorted((float(score), one.name) for one in UNITS.free() for score in l2(NET, one))
    gone = Counter(name for _, name in ranked[:13])
    assert {name: plan.counts[name] for name in (A, B, C)} == {
        A: 20 - gone[A],
        B: 10 - gone[B],
        C: 10 - gone[C],
    }
    assert GlobalRanking(saving=0.0).plan_units(UNITS, NET).saving == 0
    with pytest.raises(StropError, match=r"74\.0.% is the most"):
        GlobalRanking(saving=0.9).plan_units(UNITS, NET)


def test_one_ranking_in_blocks_leaves_the_rest_whole():
    plan = GlobalRanking(saving=0.1, where="blocks").plan_units(UNITS, NET)
    ranked = sorted(
        (float(score), one.name) for one in UNITS.free() if one.where == "block" for score in l2(NET, one)
    )
    gone = Counter(name for _, name in ranked[: sum(gone for _, gone in _gone(plan))])
    assert plan.saving >= 0.1 and dict(_gone(plan)) == gone
    with pytest.raises(ValueError, match="where must be one of blocks, all"):
        GlobalRanking(where="stem")


def _gone(plan):
    return [(row.name, row.width - row.kept) for row in plan.rows if row.kept < row.width]


def test_one_ranking_steps_by_round_to_and_leaves_a_step():
    plan = GlobalRanking(saving=0.5, round_to=4).plan_units(UNITS, NET)
    assert all(row.kept == row.width or (row.kept >= 4 and row.kept % 4 == 0) for row in plan.rows)
    assert plan.saving >= 0.5


def test_masks_zero_the_smallest_weights_and_save_no_bytes():
    masked = magnitude_masked(NET, 0.25)
    before = torch.cat([weight.flatten() for weight in NET.parameters()])
    after = torch.cat([weight.flatten() for weight in masked.parameters()])
    gone = (after == 0) & (before != 0)
    assert int(gone.sum()) == 250 and after.numel() == 1000
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert torch.equal(before[~gone], after[~gone]) and not (before == 0).any()
    with pytest.raises(StropError, match="is the most"):
        magnitude_masked(NET, 1.1)


def test_of_equal_weights_the_masks_take_the_first():
    even = Net()
    with torch.no_grad():
        for weight in even.parameters():
            weight.fill_(1.0)
    masked = torch.cat([weight.flatten() for weight in magnitude_masked(even, 0.3).parameters()])
    assert not masked[:300].any() and masked[300:].all()


def test_masks_leave_biases_and_buffers():
    model = Fused()
    masked = magnitude_masked(model, 0.3)
    zeros = sum(int((weight == 0).sum()) for name, weight in masked.named_parameters() if "weight" in name)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert zeros == round(0.3 * total)
    assert masked.qkv.bias is model.qkv.bias and masked.norm.running_var is model.norm.running_var
