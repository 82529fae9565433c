"""HQQ: the library's grids in the form of this package."""

import sys

import pytest
import torch

from strop.core.errors import StropError
from strop.weights.grid import Grid, dequantize, restored, round_to_nearest
from strop.weights.hqq import HQQ, WIDTHS

Quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
P = 0.7
"""The library's norm."""


def heavy_tailed(seed: int = 0) -> torch.Tensor:
    """Student's t with three degrees of freedom, of the size of a model's weights."""
    draw = torch.Generator().manual_seed(seed)
    normal, three = torch.randn(64, 256, generator=draw), torch.randn(3, 64, 256, generator=draw)
    return 0.02 * normal / three.square().mean(0).sqrt()


def cost(weight: torch.Tensor, found: torch.Tensor) -> float:
    return float((found.double() - weight.double()).abs().pow(P).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [3, 4])
def test_hqq_beats_rounding_in_its_own_norm(bits, dtype):
    grid = Grid(bits, 64, symmetric=False)
    for seed in range(10):
        weight = heavy_tailed(seed).to(dtype)
        ours, nearest = HQQ(bits=bits).quantize(weight, grid), round_to_nearest(weight, grid)
        assert cost(weight, restored(ours, grid)) < cost(weight, restored(nearest, grid))


@pytest.mark.parametrize("group", [64, None])
@pytest.mark.parametrize("bits", WIDTHS)
def test_hqq_stands_for_what_the_library_does(bits, group):
    weight, grid = heavy_tailed(), Grid(bits, group, symmetric=False)
    found = HQQ(bits=bits, group=group).quantize(weight, grid)
    codes, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=group, axis=1, bitpack=False, device="cpu", compute_dtype=torch.float32
    )
    theirs = Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
    assert found.codes.dtype == torch.uint8
    assert int(found.codes.max()) < 2**bits
    assert found.scale.shape == found.zero.shape == (64, 4 if group else 1)
    same = found.codes == codes.view(64, 256)
    assert same.float().mean() > 0.999  # ties aside
    torch.testing.assert_close(restored(found, grid)[same], theirs[same])
    assert cost(weight, restored(found, grid)) == pytest.approx(cost(weight, theirs), rel=1e-5)


def test_bfloat16_zeros_cost_next_to_nothing():
    weight, grid = heavy_tailed().bfloat16(), Grid(4, 64, symmetric=False)
    whole, half = (restored(HQQ().quantize(it, grid), grid) for it in (weight.float(), weight))
    assert half.dtype == torch.bfloat16
    assert cost(weight, half) < 1.01 * cost(weight, whole)


def test_codes_are_the_nearest_of_the_stored_grid():
    weight, grid = heavy_tailed().bfloat16(), Grid(8, 64, symmetric=False)
    codes, scale, zero = HQQ(bits=8).quantize(weight, grid)
    errors = [(dequantize(codes + step, scale.float(), zero.float()) - weight).abs() for step in (0, 1, -1)]
    inside = (codes > 0) & (codes < 255)
    assert (errors[0] <= torch.minimum(errors[1], errors[2]) * (1 + 1e-4))[inside].all()


def test_hqq_is_deterministic_and_leaves_things_as_they_were():
    weight, grid = heavy_tailed(), Grid(4, 64, symmetric=False)
    kept, state = weight.clone(), torch.get_rng_state()
    one, two = HQQ().quantize(weight, grid), HQQ().quantize(weight, grid)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(weight, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(tensor.is_inference() for tensor in one)


def test_hqq_refuses_what_the_library_lacks():
    for wrong in ({"bits": 7}, {"symmetric": True}, {"bits": 9}):
        with pytest.raises(ValueError, match="bits"):
            HQQ(**wrong)
    with pytest.raises(ValueError, match="asymmetric"):
        HQQ().quantize(heavy_tailed(), Grid(4, 64))


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    with pytest.raises(StropError, match=r"strop\[peers\]"):
        HQQ().quantize(heavy_tailed(), Grid(4, 64, symmetric=False))
    with pytest.raises(StropError, match=r"strop\[peers\]"):
        HQQ().plan(None)
