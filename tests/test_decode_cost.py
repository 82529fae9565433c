"""The cost model: its fit, its queries, recalibration, its file, and profiling."""

import itertools
import json
import math

import numpy as np
import pytest

import strop.decode.cost as cost_module
from strop.core.errors import StropError
from strop.decode.cost import CostModel, convex, cost_path, profile

GRID = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def test_a_kinked_curve_is_recovered():
    rng = np.random.default_rng(5)
    true = {n: 5e-3 + 6e-5 * max(0, n - 150) for n in GRID}
    measured = {n: t * (1 + 0.01 * rng.standard_normal()) for n, t in true.items()}
    fitted = np.array(list(convex(measured).values()))
    target = np.array(list(true.values()))
    assert 1 - ((fitted - target) ** 2).sum() / ((target - target.mean()) ** 2).sum() >= 0.999


@pytest.mark.parametrize("seed", range(20))
def test_fits_are_convex_and_the_nearest(seed):
    """No convex curve beside the fitted one is nearer, and one that is convex already stays."""
    rng = np.random.default_rng(seed)
    measured = dict(
        zip(GRID, 1e-3 * rng.uniform(1, 3, len(GRID)) * np.array(GRID) ** rng.uniform(0, 1), strict=True)
    )
    fitted = convex(measured)
    assert list(fitted) == list(GRID)
    slopes = np.diff(list(fitted.values())) / np.diff(GRID)
    assert slopes[0] >= 0 and (np.diff(slopes) >= -1e-12).all()
    assert convex(fitted) == pytest.approx(fitted, rel=1e-6)

    def distance(curve) -> float:
        return sum((curve[n] / measured[n] - 1) ** 2 for n in GRID)

    for start in (0, *GRID[:-1]):
        for nudge in (1e-7, 1e-5):
            beside = {n: fitted[n] + nudge * (max(0, n - start) if start else 1) for n in GRID}
            assert distance(beside) >= distance(fitted) - 1e-12


def test_small_sizes_are_fitted_as_well_as_large_ones():
    """Noise in proportion to latency at 1024 tokens does not move the price of the first few nodes."""
    rng = np.random.default_rng(6)
    errors = []
    for _ in range(50):
        measured = {n: (1 + 0.08 * (n - 1)) * (1 + 0.03 * rng.standard_normal()) for n in GRID}
        fitted = convex(measured)
        errors.append([fitted[n] / (1 + 0.08 * (n - 1)) - 1 for n in GRID[:6]])
    assert np.abs(errors).mean() < 0.03


def test_costs_between_and_beyond_what_was_profiled():
    model = CostModel({1000: {2: 2.0, 4: 2.0, 8: 6.0}, 2000: {2: 4.0, 8: 10.0}}, 0.5, 1e-3, 0.01)
    forward = {(1, 1000): 2, (3, 1000): 2, (6, 1000): 4, (12, 1000): 10, (108, 1000): 106}
    forward |= {(1, 2000): 4, (12, 2000): 14, (6, 1500): 6, (6, 1250): 5, (12, 1500): 12}
    forward |= {(6, 0): 4, (6, 999): 4, (6, 2001): 8, (6, 10**6): 8, (2, 1500): 3}
    for (tokens, context), expected in forward.items():
        assert model.verify(tokens, context) == pytest.approx(expected + 0.01 * (tokens - 1))
    assert model.draft(0) == 0.5 and model.draft(2000) == pytest.approx(2.5)
    assert CostModel({0: {1: 2.0, 2: 1.0}}).verify(1000, 0) == 1.0


def test_rounds_are_what_draft_and_verify_add_up_to():
    model = CostModel({0: {1: 1.0, 64: 2.0}, 4096: {1: 2.0, 64: 4.0}}, 0.5, 1e-4, 1e-3)
    model.factor = 1.7
    for context in (0, 31, 700, 4095, 4096, 10**5):
        said = list(model.rounds(context, 100))
        assert len(said) == 101
        for n in (0, 1, 50, 100):
            assert said[n] == pytest.approx(model.draft(context) + model.verify(n + 1, context), rel=0.02)
    assert len(list(model.rounds(0, 3))) == 4
    before = list(model.rounds(0, 3))
    model.factor = 1.0
    assert next(model.rounds(0, 3)) < before[0]


def test_recalibration_finds_the_factor_among_strays():
    rng = np.random.default_rng(7)
    for true in (0.3, 1.0, 2.5):
        model = CostModel({0: {1: 1e-3, 2: 1.1e-3}}, node_s=0.1)
        followed = []
        for _ in range(400):
            tokens = int(rng.integers(1, 65))
            measured = true * (1e-3 + 1e-4 * (tokens - 1)) * (1 + 0.05 * rng.standard_normal())
            model.observe(tokens, 0, measured * (50 if rng.random() < 0.02 else 1))
            followed.append(model.factor)
        assert np.median(followed[200:]) == pytest.approx(true, rel=0.05)
        assert max(followed[200:]) < true * 1.4
        assert model.verify(1, 0) == pytest.approx(model.factor * 1e-3)


@pytest.mark.parametrize(
    "curves",
    [{}, {0: {}}, {0: {1: 1.0}}, {0: {1: 0.0, 2: 1.0}}, {0: {1: 1.0, 2: math.nan}}, {0: {0: 1.0, 2: 1.0}}],
)
def test_curves_that_are_none_are_refused(curves):
    with pytest.raises(ValueError, match="c"):
        CostModel(curves)
    with pytest.raises(ValueError, match="drafting"):
        CostModel({0: {1: 1.0, 2: 1.0}}, draft_s=-1.0)


# Files.


def test_a_model_survives_its_file(tmp_path):
    rng = np.random.default_rng(8)
    measured = {c: {n: 1e-3 * (1 + 0.05 * n) * rng.uniform(0.9, 1.1) for n in GRID} for c in (0, 1024, 4096)}
    model = CostModel.fit(measured, 2e-3, 1e-7, 1e-6)
    model.observe(8, 0, 1.0)
    path = tmp_path / "deep" / "cost.json"
    model.save(path)
    loaded = CostModel.load(path)
    assert loaded.factor == 1.0 and loaded.curves == model.curves
    assert (loaded.draft_s, loaded.draft_slope, loaded.node_s) == (2e-3, 1e-7, 1e-6)
    assert [file.name for file in path.parent.iterdir()] == ["cost.json"]
    with pytest.raises(ValueError, match="not convex"):
        CostModel({0: {1: 1.0, 2: 2.0, 3: 2.0}}).save(path)
    assert CostModel.load(path) == loaded


@pytest.mark.parametrize(
    "change",
    [
        {"strop": 2},
        {"draft_s": None},
        {"draft_s": -1.0},
        {"node_s": "many"},
        {"curves": []},
        {"curves": {}},
        {"curves": {"0": [1.0, 2.0]}},
        {"curves": {"zero": {"1": 1.0, "2": 2.0}}},
        {"curves": {"0": {"1": 1.0}}},
        {"curves": {"0": {"1": 1.0, "2": math.nan}}},
        {"curves": {"0": {"1": -1.0, "2": 2.0}}},
        {"curves": {"0": {"1": 1.0, "2": 2.0, "3": 2.5}}},
        {"curves": {"0": {"1": 2.0, "2": 1.0}}},
    ],
)
def test_files_that_are_none_are_refused_in_a_sentence(tmp_path, change):
    path = tmp_path / "cost.json"
    CostModel({0: {1: 1.0, 2: 1.0}}).save(path)
    sound = json.loads(path.read_text())
    for broken in (json.dumps({**sound, **change}), json.dumps(sound)[:-20], "[]", "null", "\x00"):
        path.write_text(broken)
        with pytest.raises(StropError, match=r"cannot read the cost model .* measure again"):
            CostModel.load(path)
    for name in sound:
        path.write_text(json.dumps({key: value for key, value in sound.items() if key != name}))
        with pytest.raises(StropError, match=name):
            CostModel.load(path)
    path.unlink()
    with pytest.raises(StropError, match="measure again"):
        CostModel.load(path)


def test_models_are_kept_by_what_they_depend_on(tmp_path, monkeypatch):
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    first = cost_path("model", {"device": "cpu"}, 1)
    assert first.parent == tmp_path / "cost" and first.suffix == ".json"
    assert first == cost_path("model", {"device": "cpu"}, 1) != cost_path("model", {"device": "cpu"}, 2)
    monkeypatch.delenv("STROP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cost_path("model").parent == tmp_path / "user" / "strop" / "cost"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cost_path("model").parent == tmp_path / ".cache" / "strop" / "cost"


# Profiling.


class Machine:
    """Forwards that slow down as it runs, and take 100 times as long when cold and once in between."""

    def __init__(self, drift: float = 0.0) -> None:
        self.drift = drift
        self.asked: list[tuple[int, int]] = []

    def __call__(self, tokens: int, context: int) -> float:
        before = self.asked.count((tokens, context))
        stray = before < cost_module.WARM_UPS or before == cost_module.WARM_UPS + 3
        self.asked.append((tokens, context))
        return (
            (1 + 0.1 * tokens + 1e-3 * context) * (1 + self.drift * len(self.asked)) * (100 if stray else 1)
        )


def test_a_profile_holds_medians_of_what_is_warm():
    machine, heard = Machine(), []
    found = profile(machine, (0, 1000), (1, 4, 16), lambda what, share: heard.append((what, share)))
    assert found == {c: {n: pytest.approx(1 + 0.1 * n + 1e-3 * c) for n in (1, 4, 16)} for c in (0, 1000)}
    shares = [share for _, share in heard]
    assert shares == sorted(shares) and 0 < shares[0] < 0.5 and shares[-1] == 1.0
    assert [context for context, _ in itertools.groupby(c for _, c in machine.asked)] == [0, 1000]
    assert profile(Machine(), (0,), (1, 2)).keys() == {0}


def test_drift_falls_on_all_sizes_alike():
    found = profile(Machine(drift=0.01), (0,), GRID)[0]
    ratios = np.array([found[n] / (1 + 0.1 * n) for n in GRID])
    assert ratios.max() / ratios.min() < 1.01 < ratios.min()


def test_slow_contexts_are_repeated_less_often(monkeypatch):
    monkeypatch.setattr(cost_module, "SECONDS", 0.0)
    machine = Machine()
    profile(machine, (0,), (1, 2))
    assert len(machine.asked) == 2 * (cost_module.WARM_UPS + cost_module.LEAST_REPEATS)
