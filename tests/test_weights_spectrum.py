"""The spectral exponent: FARMS on known spectra, its error against brute force, and the gate on noise."""

import math

import numpy as np
import pytest
import torch

from strop.core.errors import StropError
from strop.weights.spectrum import (
    AlphaStat,
    auto_gamma,
    hill,
    sensitivity,
    signal,
    spectral_alpha,
    tile_for,
)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(beta: float, side: int = 256, seed: int = 0) -> torch.Tensor:
    """A matrix whose eigenvalues are the quantiles of a density `lambda ** -beta`, in random bases."""
    left, right = (torch.linalg.qr(gaussian(side, side, seed=2 * seed + at))[0] for at in (0, 1))
    quantiles = torch.arange(1, side + 1) / side
    return left * quantiles ** (-0.5 / (beta - 1)) @ right


def spectra(weight: torch.Tensor, tile: int) -> np.ndarray:
    """Squared singular values of all tiles `[T, tile]` in float64, tile by tile."""
    rows, columns = (edge - edge % tile for edge in weight.shape)
    tiles = [
        weight[row : row + tile, column : column + tile].double()
        for row in range(0, rows, tile)
        for column in range(0, columns, tile)
    ]
    return np.stack([torch.linalg.svdvals(each).numpy() ** 2 for each in tiles])


def whole(weight: torch.Tensor) -> float:
    """The exponent of the full spectrum, without tiles."""
    return hill(torch.linalg.svdvals(weight.double()).numpy() ** 2)


def test_hill_is_the_formula():
    values = np.random.default_rng(0).pareto(1.5, 300) + 1
    ordered = sorted(values, reverse=True)
    assert hill(values) == pytest.approx(1 + 30 / sum(math.log(x / ordered[30]) for x in ordered[:30]))
    assert hill(values, 0.5) == pytest.approx(
        1 + 150 / sum(math.log(x / ordered[150]) for x in ordered[:150])
    )
    few = 1 + 10 / sum(math.log(x / ordered[10]) for x in ordered[:10])
    assert hill(np.array(ordered[:40])) == pytest.approx(few)
    assert hill(np.array(ordered[:8])) == pytest.approx(
        1 + 7 / sum(math.log(x / ordered[7]) for x in ordered[:7])
    )


def test_hill_finds_the_exponent_of_a_power_law():
    values = np.random.default_rng(1).pareto(2.0, 200_000) + 1
    assert hill(values) == pytest.approx(3.0, abs=0.06)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 256), (300, 150)])
def test_the_tail_equals_singular_values_in_float64(shape: tuple[int, int], dtype: torch.dtype):
    weight = gaussian(*shape, seed=3).to(dtype)
    stat = spectral_alpha(weight, tile=64)
    reference = spectra(weight, 64)
    assert stat.n == reference.size
    assert stat.alpha == pytest.approx(hill(reference), rel=1e-5)


@pytest.mark.parametrize("spike", [0.3, 30, 3000])
def test_one_large_direction_does_not_drown_the_tail(spike: float):
    weight = gaussian(256, 256) + spike * gaussian(256, 1, seed=1) @ gaussian(1, 256, seed=2)
    assert spectral_alpha(weight, tile=64).alpha == pytest.approx(hill(spectra(weight, 64)), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_scale_does_not_matter(scale: float):
    weight = gaussian(128, 128)
    assert spectral_alpha(weight * scale, tile=32).alpha == pytest.approx(
        spectral_alpha(weight, tile=32).alpha, rel=1e-4
    )


def test_shape_does_not_matter_to_tiles_and_does_to_whole_matrices():
    weights = [gaussian(rows, 512, seed=rows) for rows in (512, 1024, 2048)]
    tiled = [spectral_alpha(weight).alpha for weight in weights]
    assert max(tiled) - min(tiled) < 0.3
    assert all(6.0 <= alpha <= 6.7 for alpha in tiled)
    assert whole(weights[-1]) - whole(weights[0]) > 3


def test_heavier_tails_have_smaller_alpha():
    ordered = 0
    for seed in range(20):
        alphas = [spectral_alpha(planted(beta, seed=seed)).alpha for beta in (2, 3, 4, 6)]
        ordered += alphas == sorted(alphas)
    assert ordered >= 19


def test_at_most_256_tiles_are_drawn_by_the_seed_alone():
    weight = gaussian(320, 320)
    stat = spectral_alpha(weight, tile=16)
    assert stat.n == 256 * 16
    torch.manual_seed(5)
    assert spectral_alpha(weight, tile=16) == stat
    assert spectral_alpha(weight, tile=16, seed=1) != stat
    everything = hill(spectra(weight, 16))
    assert abs(stat.alpha - everything) < 4 * stat.se


def test_alpha_leaves_torch_as_it_was():
    weight = gaussian(64, 64).requires_grad_()
    state, copy, threads = torch.random.get_rng_state(), weight.detach().clone(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        spectral_alpha(weight, tile=16)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(weight, copy)


@pytest.mark.parametrize(
    "make", [lambda seed: gaussian(256, 256, seed=seed), lambda seed: planted(3, seed=seed)]
)
def test_the_error_is_that_of_the_bootstrap_over_tiles(make):
    for seed in range(4):
        weight = make(seed)
        pooled, rng = spectra(weight, 32), np.random.default_rng(seed)
        count = len(pooled)
        drawn = [hill(pooled[rng.integers(0, count, count)]) for _ in range(400)]
        brute = np.std(drawn, ddof=1) * math.sqrt(count / (count - 1))
        assert spectral_alpha(weight, tile=32).se == pytest.approx(brute, rel=0.25)


@pytest.mark.parametrize(("shape", "tile"), [((128, 256), 32), ((256, 256), 64)])
def test_the_error_is_the_spread_over_matrices_of_noise(shape: tuple[int, int], tile: int):
    stats = [spectral_alpha(gaussian(*shape, seed=seed), tile=tile) for seed in range(100)]
    assert signal(stats).se == pytest.approx(signal(stats).spread, rel=0.25)


def test_noise_is_no_signal():
    for seed in range(24):
        stats = [spectral_alpha(gaussian(64, 128, seed=100 * seed + at), tile=32) for at in range(8)]
        found = signal(stats)
        assert not found.present
        assert found.said.startswith("No spectral signal: over 8 matrices")


def test_noise_of_several_shapes_is_no_signal():
    shapes = [(64, 128), (128, 64), (128, 128), (256, 128), (512, 128)] * 2
    tile = tile_for(shapes)
    for seed in range(20):
        stats = [
            spectral_alpha(gaussian(*shape, seed=100 * seed + at), tile=tile)
            for at, shape in enumerate(shapes)
        ]
        assert not signal(stats).present


def test_planted_tails_are_a_signal():
    for seed in range(20):
        stats = [
            spectral_alpha(planted(2 + at / 4, side=128, seed=8 * seed + at), tile=32) for at in range(8)
        ]
        found = signal(stats)
        assert found.present
        assert found.said.startswith("Spectral signal: over 8 matrices")


def test_the_signal_is_the_spread_against_twice_the_error():
    stats = [AlphaStat(alpha, se, 100) for alpha, se in [(3.0, 0.3), (4.0, 0.4), (5.0, 0.5)]]
    found = signal(stats)
    assert found.spread == pytest.approx(1.0)
    assert found.se == pytest.approx(math.sqrt((0.09 + 0.16 + 0.25) / 3))
    assert found.present
    assert not signal([stat._replace(se=0.51) for stat in stats]).present
    assert not signal(stats[:1]).present
    assert "0.408" in found.said


def test_gamma_gives_the_ratio_that_was_asked_for():
    alphas = np.random.default_rng(0).uniform(3, 6, 500)
    gamma = auto_gamma(alphas, 8.0)
    low, high = np.percentile(alphas, (5, 95))
    assert (high / low) ** gamma == pytest.approx(8.0)
    weight = sensitivity(alphas, gamma)
    assert np.array_equal(np.argsort(weight), np.argsort(-alphas))
    assert np.median(weight) == pytest.approx(1.0, abs=0.01)
    assert np.all(sensitivity(alphas, 0.0) == 1)
    assert auto_gamma(alphas, 64.0) == pytest.approx(2 * gamma)


def test_any_gamma_gives_finite_sensitivities():
    alphas = np.array([1.01, 3.0, 4.0, 4.1, 900.0])
    for gamma in (1e3, 1e6, 1e300):
        weight = sensitivity(alphas, gamma)
        assert np.isfinite(weight).all() and (weight > 0).all()
        assert (np.diff(weight) <= 0).all() and weight[0] > 1e200 * weight[2] and weight[2] == 1
    np.testing.assert_allclose(sensitivity(alphas, 30.0), (4.0 / alphas) ** 30.0)


@pytest.mark.parametrize(
    ("shapes", "tile"),
    [
        ([(512, 512)], 128),
        ([(768, 2048), (2048, 768)], 128),
        ([(512, 512), (256, 256)], 64),
        ([(256, 512)], 128),
        ([(256, 511)], 64),
        ([(64, 128)], 32),
        ([(32, 64)], 16),
    ],
)
def test_one_tile_size_serves_all_shapes(shapes: list[tuple[int, int]], tile: int):
    assert tile_for(shapes) == tile


def test_least_says_how_many_tiles():
    assert tile_for([(256, 256)], least=4) == 128
    assert tile_for([(256, 256)], least=5) == 64


BROKEN = {
    "all zeros": torch.zeros(64, 64),
    "NaN": torch.full((64, 64), math.nan),
    "infinity": gaussian(64, 64).index_fill(0, torch.tensor(3), math.inf),
    "low rank": gaussian(64, 1) @ gaussian(1, 64, seed=1),
    "equal": torch.eye(64),
    "smaller tile": gaussian(31, 512),
    "fewer than two": gaussian(32, 63),
}


@pytest.mark.parametrize(("reason", "weight"), BROKEN.items(), ids=BROKEN)
def test_a_matrix_without_a_tail_is_refused(reason: str, weight: torch.Tensor):
    with pytest.raises(StropError, match=reason):
        spectral_alpha(weight, tile=32)


def test_a_mistake_in_the_rest_is_refused():
    with pytest.raises(StropError, match="20 x 24 holds fewer than 8 tiles"):
        tile_for([(512, 512), (20, 24)])
    with pytest.raises(StropError, match="gamma=0"):
        auto_gamma([4.0, 4.0, 4.0])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: spectral_alpha(gaussian(2, 64, 64)),
        lambda: spectral_alpha(torch.ones(64, 64, dtype=torch.int64)),
        lambda: spectral_alpha(gaussian(64, 64), tile=1),
        lambda: spectral_alpha(gaussian(64, 64), tile=32, k_frac=1.0),
        lambda: tile_for([]),
        lambda: signal([]),
        lambda: auto_gamma([3.0, 4.0], 1.0),
    ],
)
def test_a_programming_mistake_is_a_value_error(wrong):
    with pytest.raises(ValueError):
        wrong()
