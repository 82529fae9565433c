"""Grids: the nearest of the numbers that a group may take, and what rounding to them costs."""

import math

import pytest
import torch

from strop.weights import RTN
from strop.weights.grid import Grid, restored, round_to_nearest

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def noise(weight: torch.Tensor, bits: int, group: int | None = 128, symmetric: bool = False) -> float:
    """Mean squared error of rounding over the variance."""
    grid = Grid(bits, group, symmetric)
    error = restored(round_to_nearest(weight, grid), grid) - weight
    return float(error.square().mean() / weight.var())


def gaussian(rows: int = 512, columns: int = 1024) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (3, 4), (2, 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_weight_gets_the_nearest_code_within_half_a_step(bits, group, symmetric, dtype):
    weight = (torch.randn(12, 16, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    weight[0] = 0
    weight[1] = weight[1].abs()  # where a symmetric grid is shorter
    grid = Grid(bits, group, symmetric)
    codes, scale, zero = round_to_nearest(weight, grid)
    assert (codes.dtype, scale.dtype) == (torch.uint8, dtype)
    assert zero is None if symmetric else torch.equal(zero, zero.round())
    width = group or 16
    for row in range(12):
        for column in range(16):
            s = scale[row, column // width].item()
            z = 2 ** (bits - 1) if zero is None else zero[row, column // width].item()
            w = weight[row, column].item()
            error = abs(w - (codes[row, column].item() - z) * s)
            nearest = min(abs(w - (code - z) * s) for code in range(2**bits))
            assert error <= s / 2 * (1 + 1e-4)
            assert math.isclose(error, nearest, rel_tol=1e-4, abs_tol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_are_no_wider_than_they_must_be(symmetric, dtype):
    weight = gaussian(32, 64).to(dtype)
    scale = round_to_nearest(weight, Grid(4, 16, symmetric)).scale.float()
    groups = weight.float().unflatten(-1, (-1, 16))
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    least = 2 * groups.abs().amax(-1) / 15 if symmetric else (high - low) / 15
    ratio = scale / least
    assert (ratio >= 1 - 1e-6).all() and (ratio <= 1.01).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_is_kept_exactly(bits, dtype):
    weight = gaussian(8, 64).to(dtype)
    weight[:, ::3] = 0
    weight[0] = 0
    for symmetric in (True, False):
        grid = Grid(bits, 16, symmetric)
        back = restored(round_to_nearest(weight, grid), grid)
        assert (back[weight == 0] == 0).all()


def test_one_bit_is_sign_times_mean_magnitude():
    weight = gaussian(16, 64)
    grid = Grid(1, 32)
    groups = weight.unflatten(-1, (-1, 32))
    expected = (groups.sign() * groups.abs().mean(-1, keepdim=True)).flatten(-2)
    torch.testing.assert_close(restored(round_to_nearest(weight, grid), grid), expected)


def test_one_bit_loses_what_theory_says_of_gaussian_weights():
    assert noise(gaussian(), 1, symmetric=True) == pytest.approx(1 - 2 / math.pi, rel=0.02)


@pytest.mark.parametrize("shift", [0, 0.5, 2])
def test_one_bit_with_a_zero_is_no_worse_than_without(shift):
    draw = torch.Generator().manual_seed(1)
    weight = gaussian() + shift * 0.02 * torch.randn(512, 1, generator=draw)
    assert noise(weight, 1, symmetric=False) <= noise(weight, 1, symmetric=True) * 1.001


@pytest.mark.parametrize(("bits", "ratio"), [(2, 4.0), (3, 2.9), (4, 2.6), (8, 2.3)])
def test_rounding_costs_more_than_theory_says(bits, ratio):
    """Var(W) 2^-2b understates the noise of groups of 128 Gaussian weights, most of all at few bits."""
    assert noise(gaussian(), bits) * 4**bits == pytest.approx(ratio, rel=0.05)


def test_effective_bits_count_scales_and_zeros():
    assert Grid(4, 128).effective_bits(1024) == 4 + 16 / 128
    assert Grid(4, 128, symmetric=False).effective_bits(1024) == 4 + 32 / 128
    assert Grid(3).effective_bits(64) == 3 + 16 / 64
    assert Grid(3).effective_bits(64, itemsize=4) == 3 + 32 / 64


def test_rounding_is_that_of_the_method():
    weight = gaussian(16, 64)
    method = RTN(bits=3, group=16, symmetric=False)
    for found, expected in zip(
        method.quantize(weight, method.grid), round_to_nearest(weight, Grid(3, 16, False)), strict=True
    ):
        assert torch.equal(found, expected)
