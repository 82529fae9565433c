"""Claims about features' survival: experiments run, repeat, and stop where a control is off."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from claiming import SEVERAL, require_whole
from quantizing import build, save

import strop
from strop.audit.sae import SAE
from strop.claims import sae_survival_study
from strop.claims.base import Progress, Table, joined
from strop.claims.sae_survival import NARROWEST, missed, verdicts
from strop.claims.sae_survival_bed import SCALES, Bed, Scale, Subject, drawn, lay
from strop.claims.sae_survival_study import (
    Found,
    alike,
    changes_study,
    controls_study,
    halfway,
    parts,
    predictor_study,
    rounded,
    studies,
)
from strop.claims.sae_survival_use import NEAR, nearest
from strop.core.errors import StropError
from strop.core.sampling import keyed_normal
from strop.kv import KVarN, VaSE
from strop.weights import RTN
from strop.weights.alphaq import AlphaQ

MODELS = {"zoo:one": "qwen3", "zoo:two": "qwen2_moe"}
TINY = Scale(
    name="tiny",
    models=tuple(MODELS),
    seeds=3,
    each=4,
    length=192,
    widths=(8, 5, 4, 2),
    weights=(RTN(bits=4, group=32),),
    experts=(AlphaQ(bits=3, quantizer=RTN(bits=4, group=32, symmetric=False)),),
    caches=(KVarN(bits=2, group=32, sinks=4, tail=32), VaSE(budget=64, buffer=32)),
    steps=8,
    draws=3,
    spliced=1,
)


def quiet(*said):
    """A report and a step that nobody hears."""


def subject(name: str, folder, seed: int) -> Subject:
    """An untrained model with a dictionary of random directions."""
    lm = strop.load(save(build(MODELS[name]), folder), dtype="fp32")
    directions = keyed_normal((96, 64), seed, "test") / 8
    sae = SAE(directions.T.contiguous(), torch.zeros(96), directions, torch.zeros(64), 0, form="topk", k=8)
    draw = torch.Generator().manual_seed(seed)
    return Subject(name, lm, sae, torch.randint(1, 257, (TINY.seeds, TINY.each, TINY.length), generator=draw))


@pytest.fixture(scope="module")
def bed(tmp_path_factory) -> Bed:
    folders = (tmp_path_factory.mktemp("model") for _ in MODELS)
    return Bed(tuple(subject(*facts, seed) for seed, facts in enumerate(zip(MODELS, folders, strict=True))))


@pytest.fixture(scope="module")
def tables(bed) -> tuple[dict[str, Table], list[float]]:
    shares: list[float] = []
    each = parts(TINY)
    progress = Progress(lambda what, share: shares.append(share), sum(one.steps for one in each))
    return joined(one.study(bed, progress) for one in each), shares


def test_every_claim_says_everything(tables):
    found = verdicts(tables[0], TINY)
    # At this size no feature may be damaged, and no pair have equal loss.
    require_whole(found, 8, "sae-survival", seeds=range(SEVERAL.stop), bare=2)


def test_every_change_of_every_slot_was_read(tables):
    changes = tables[0]["changes"]
    for model, extra in (("zoo:one", 0), ("zoo:two", 1)):
        rows = changes.where(model=model)
        assert len(rows) == len(TINY.widths) + 1 + extra + 2
        assert [row["slot"] for row in rows].count("kv") == 2
        assert all(len(row["survived"]) == len(row["loss_rise"]) == TINY.seeds for row in rows)
        assert all(max(row["mean"]) < 1 - 1e-6 for row in rows)
        worst, best = (changes.pick("mean", model=model, change=rounded(bits)) for bits in (2, 8))
        assert np.all(np.array(worst) < best)  # random weights, but rounding is rounding


def test_controls_are_rows_of_their_own(tables):
    controls = tables[0]["controls"]
    for model in MODELS:
        assert controls.pick("mean", model=model, control="same") == pytest.approx([1] * TINY.seeds)
        assert abs(np.mean(controls.pick("mean", model=model, control="mispaired"))) < 0.1
        assert controls.where(model=model, control="untrained") and controls.where(control="neurons")
    splice = tables[0]["splice"]
    assert all(row["back"] == pytest.approx([1] * TINY.seeds) for row in splice.where(set="all"))


def test_progress_never_goes_back_and_ends_in_time(tables):
    shares = tables[1]
    assert shares == sorted(shares) and shares[0] == 0 and 0.85 < shares[-1] <= 1


def test_experiments_repeat(bed, tables):
    again = studies(0, TINY, bed, Progress(quiet, 1))
    for name, table in again.items():
        assert json.dumps(table.rows) == json.dumps(tables[0][name].where(model="zoo:one")), name


@pytest.fixture(scope="module")
def known(bed) -> tuple[Subject, Scale, Found]:
    """A model read at two widths, for controls to be spoilt."""
    scale = dataclasses.replace(TINY, widths=(8, 5), weights=(), caches=())
    one, found = dataclasses.replace(bed.subjects[0]), Found()
    changes_study(one, scale, found, quiet)
    return one, scale, found


def test_widths_are_chosen_by_what_they_leave_and_cost(known):
    _, scale, found = known
    assert halfway(scale, found) in scale.widths and alike(scale, found) in scale.widths
    same = dataclasses.replace(scale, widths=(8,))
    assert halfway(same, found) == alike(same, found) == 8


def test_features_that_differ_from_themselves_stop_the_experiment(known):
    one, scale, found = known
    spoilt = copy.copy(one)
    first, *rest = one.kept
    spoilt.kept = [dataclasses.replace(first, features=tuple(2 * part for part in first.features)), *rest]
    controls_study(one, scale, found, quiet)
    with pytest.raises(RuntimeError, match="differ from themselves"):
        controls_study(spoilt, scale, found, quiet)


def test_features_that_follow_others_stop_the_experiment(known, monkeypatch):
    monkeypatch.setattr(sae_survival_study, "mispaired", lambda features: features)
    with pytest.raises(RuntimeError, match="correlate with others"):
        controls_study(*known, quiet)


def test_labels_predicted_by_chance_stop_the_experiment(known, monkeypatch):
    one, scale, found = known
    half = dataclasses.replace(scale, widths=(halfway(scale, found),))
    rows = predictor_study(one, half, found, quiet)
    assert rows and all(0 <= value <= 1 for row in rows for value in (*row["joint"], *row["shuffled"]))
    monkeypatch.setattr(sae_survival_study, "shuffled", lambda known, draws, seed: [0.6, 0.61, 0.6])
    with pytest.raises(RuntimeError, match="dealt at random"):
        predictor_study(one, half, found, quiet)


def change(name: str, slot: str, rise: float, **measures: float) -> dict:
    kept = {"survived": 0.95, "survived_firing": 0.9, "f1": 0.9, "perplexity_rise": rise} | measures
    lists = {key: [value] * 3 for key, value in kept.items()}
    return {"model": "zoo:one", "change": name, "slot": slot, "loss_rise": [rise] * 3} | lists


def test_pairs_are_of_the_nearest_loss_and_no_farther():
    rows = [
        change("w1", "weights", 0.01),
        change("w2", "weights", 0.02, survived=0.8),
        change("w3", "weights", -0.001),
        change("near", "kv", 0.019),
        change("far", "kv", 0.02 * NEAR * 1.01),
        change("none", "kv", 0.0001),
    ]
    (pair,) = nearest(rows)
    assert (pair["change"], pair["against"]) == ("near", "w2")
    assert pair["survived_gap"] == pytest.approx([0.15] * 3) and pair["ratio"] == pytest.approx(0.95)


def test_what_is_missed_is_asked_at_the_narrowest_width_that_would_pass():
    scale = dataclasses.replace(TINY, models=("zoo:one",), widths=(8, 6, 4))
    rises = {8: 0.001, 6: 0.009, 4: 0.02}
    kept = {8: 0.99, 6: 0.7, 4: 0.5}
    rows = [change(rounded(bits), "weights", rises[bits], survived=kept[bits]) for bits in scale.widths]
    controls = Table([{"control": "same", "mean": [1.0] * 3, "rate": [0.1] * 3}], 0.0)
    claim = missed(scale, Table(rows, 1.0), controls)
    assert claim.interval == pytest.approx((70, 70)) and claim.verdict == "reproduced"
    rows[1]["survived"] = [0.95] * 3
    assert missed(scale, Table(rows, 1.0), controls).verdict == "not here"


def test_sequences_are_drawn_once_each():
    rows = torch.arange(40)[:, None].expand(40, TINY.length)
    found = drawn(rows, TINY)
    assert found.shape == (3, 4, TINY.length) and len(found[..., 0].unique()) == 12
    assert torch.equal(found, drawn(rows, TINY))
    with pytest.raises(StropError, match="11 sequences to read, and 12 are needed"):
        drawn(rows[:11], TINY)


def test_a_bundled_model_is_laid_with_its_autoencoder():
    scale = dataclasses.replace(TINY, models=("zoo:moe-1",), seeds=1, each=1, length=256)
    (one,) = lay(scale, quiet).subjects
    one.read()
    (kept,) = one.kept
    assert one.sae.d == one.lm.model.config.hidden_size and one.lm.dtype == torch.float32
    assert kept.rows.shape == (1, 256) and 1 < kept.loss / kept.tokens < 4
    fires = [float((part.to_dense() > 0).sum(1).float().mean()) for part in kept.features]
    assert fires == pytest.approx([one.sae.k] * len(fires), abs=1)


def test_scales_cover_the_paper_and_repeat_enough():
    for scale in SCALES.values():
        assert scale.seeds >= 5 and scale.steps >= 12 and len(scale.models) == 3
        assert [bits for bits in scale.widths if bits >= NARROWEST] == [8, 7, 6, 5, 4]
