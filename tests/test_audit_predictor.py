"""Predicting survival: a planted dependence, the null, and text that is told apart."""

import sys

import numpy as np
import pytest
import torch

from strop.audit.moments import StreamingPearson
from strop.audit.predictor import NAMES, OTHERS, Evidence, auc, evidence, joint, shuffled, univariate
from strop.audit.survival import FIRINGS, SURVIVED, Survival
from strop.core.errors import StropError

FIRST = np.array([True, False])
"""The first of two folds."""


def planted(n: int = 3000, seed: int = 0) -> Evidence:
    """Survival that rests on the peak alone."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    return Evidence(x, rng.random(n) < 1 / (1 + np.exp(-3 * x[:, 2])))


def test_a_planted_dependence_is_found_and_labels_dealt_at_random_are_not():
    known = planted()
    alone = univariate(known)
    assert joint(known) > 0.8 and alone["peak"] > 0.8
    assert max(alone["rarity"], alone["mean"]) < 0.55 and set(alone) == {*NAMES, *OTHERS}
    dealt = shuffled(known, draws=8)
    assert len(set(dealt)) == 8 and abs(np.mean(dealt) - 0.5) < 0.03
    assert joint(known) == joint(known)


def test_no_predictor_follows_from_the_others():
    stream = StreamingPearson(400, folds=2)
    draw = torch.Generator().manual_seed(0)
    features = (torch.randn(3000, 400, generator=draw) - torch.linspace(0, 2, 400)).relu()
    stream.update(features, features, torch.arange(3000) % 2)
    known = evidence(Survival(stream, np.ones((3, 2))), FIRST, ~FIRST)
    assert np.linalg.matrix_rank(known.x - known.x.mean(0)) == 3 and known.y.all() and not known.decided


def test_auc_is_the_chance_of_the_right_order():
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
    pairs = scores[labels][:, None] - scores[~labels][None]
    assert auc(scores, labels) == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)))


def test_predictors_and_labels_come_from_different_text():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1000, 12, generator=draw).relu()
    y = x.clone()
    y[1, :, 6:] = torch.randn(1000, 6, generator=draw).relu()  # lost in the second fold alone
    stream = StreamingPearson(12, folds=2)
    for fold in (0, 1):
        stream.update(x[fold], y[fold], torch.full((1000,), fold))
    found = Survival(stream, np.ones((3, 2)))
    forth, back = evidence(found, FIRST, ~FIRST), evidence(found, ~FIRST, FIRST)
    assert forth.y.tolist() == [True] * 6 + [False] * 6 and back.y.all()
    fires = (x[0] > 0).double()
    expected = [
        -fires.mean(0).log(),
        (x[0].double().sum(0) / fires.sum(0)).log(),
        x[0].amax(0).double().log(),
    ]
    assert np.allclose(forth.x, torch.stack(expected, 1).numpy())
    assert not np.allclose(forth.x, back.x)


def test_features_that_fire_too_seldom_on_one_side_are_left_out():
    x = torch.ones(2000, 4)
    x[: 1000 - FIRINGS + 1, 1] = 0  # once too seldom here
    x[1000:, 2] = 0  # never elsewhere
    x[1000 + FIRINGS - 1 :, 3] = 0  # once too seldom elsewhere
    stream = StreamingPearson(4, folds=2)
    stream.update(x, x, torch.arange(2000) // 1000)
    assert len(evidence(Survival(stream, np.ones((3, 2))), FIRST, ~FIRST).x) == 1
    assert SURVIVED == 0.9


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(StropError, match=r"scikit-learn: pip install 'strop\[audit\]'"):
        joint(planted(50))
