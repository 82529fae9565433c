"""GPTQ beside a reference that inverts the rest of the Hessian at every column; the Hessians it reads."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from strop.core.errors import StropError
from strop.weights.experts import Experts
from strop.weights.gptq import GPTQ, inverse_factor
from strop.weights.grid import Codes, Grid, encode, restored, round_to_nearest, scales
from strop.weights.hessian import hessians_of


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(inputs: int, seed: int = 0) -> torch.Tensor:
    """A positive definite Hessian of inputs that mix few causes and differ in size."""
    x = draw(4 * inputs, inputs, seed=seed) + 2 * draw(4 * inputs, 4, seed=seed + 1) @ draw(
        4, inputs, seed=seed + 2
    )
    x *= 1 + torch.arange(inputs) % 5
    return 2 / len(x) * x.T @ x


def grid_of(method: GPTQ) -> Grid:
    return Grid(method.bits, method.group, method.symmetric)


def costs(method: GPTQ, weight: torch.Tensor, hessian: torch.Tensor) -> list[float]:
    """What the errors of `method` and of rounding cost on the inputs."""
    grid, found = grid_of(method), []
    for quantized in (method.quantize(weight, grid, hessian), round_to_nearest(weight, grid)):
        error = (restored(quantized, grid) - weight).double()
        found.append(float((error @ hessian.double() * error).sum()))
    return found


def slow(method: GPTQ, weight: torch.Tensor, hessian: torch.Tensor) -> Codes:
    """Optimal brain surgery, column by column, in double precision and without a factorization."""
    grid, width = grid_of(method), method.group or weight.shape[1]
    left, h = weight.double(), hessian.double()
    h = h + method.percdamp * h.diagonal().mean() * torch.eye(len(h))
    scale, zero = scales(weight, grid)
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    columns = [*range(len(h))]
    if method.act_order:
        columns.sort(key=lambda column: -float(hessian[column, column]))
    for done, column in enumerate(columns):
        here = slice(column // width, column // width + 1)
        if column % width == 0 and not method.act_order:
            new, offset = scales(left[:, column : column + width].float(), grid)
            scale[:, here] = new
            if zero is not None:
                zero[:, here] = offset
        one = scale[:, here], None if zero is None else zero[:, here]
        code = encode(left[:, column, None].float(), *one, grid)
        rest = columns[done:]
        inverse = h[rest][:, rest].inverse()
        error = left[:, column] - restored(Codes(code, *one), grid)[:, 0]
        left[:, rest] -= error[:, None] * (inverse[0] / inverse[0, 0])
        codes[:, column] = code[:, 0]
    return Codes(codes, scale, zero)


@pytest.mark.parametrize(
    "method",
    [
        GPTQ(group=None, block=16),
        GPTQ(group=8, block=16),
        GPTQ(group=16, block=8),
        GPTQ(group=16, block=10, symmetric=False),
        GPTQ(group=16, block=40, bits=3),
        GPTQ(group=8, block=16, bits=1),
        GPTQ(group=8, block=16, act_order=True),
        GPTQ(group=None, block=16, act_order=True, symmetric=False),
    ],
    ids=lambda method: method.settings(),
)
def test_gptq_equals_the_slow_reference(method):
    weight, hessian = draw(12, 48), correlated(48)
    kept = weight.clone(), hessian.clone()
    found, expected = method.quantize(weight, grid_of(method), hessian), slow(method, weight, hessian)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])
    assert torch.equal(found.codes, expected.codes)
    assert found.scale.dtype == weight.dtype
    torch.testing.assert_close(found.scale, expected.scale)
    assert (found.zero is None) == method.symmetric
    if found.zero is not None:
        assert torch.equal(found.zero, expected.zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_beats_rounding_on_correlated_inputs(bits, act_order, dtype):
    method = GPTQ(bits=bits, group=16, block=32, act_order=act_order)
    for seed in range(10):
        weight = draw(16, 64, seed=seed).to(dtype)
        ours, nearest = costs(method, weight, correlated(64, seed))
        assert ours < nearest


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_nothing_to_make_up_is_round_to_nearest(symmetric, act_order):
    method = GPTQ(group=16, block=32, symmetric=symmetric, act_order=act_order)
    weight = draw(8, 64)
    alone = torch.diag(1 + torch.arange(64) % 7).float()
    for hessian in (None, torch.zeros(64, 64), alone):
        found = method.quantize(weight, grid_of(method), hessian)
        for mine, nearest in zip(found, round_to_nearest(weight, grid_of(method)), strict=True):
            assert mine is nearest is None or torch.equal(mine, nearest)


def test_a_channel_that_was_always_zero_is_rounded_and_moves_nothing():
    method, dead = GPTQ(group=None), 5
    weight, hessian = draw(8, 32), correlated(32)
    hessian[dead], hessian[:, dead] = 0, 0
    weight[:, 0] = 4  # the largest, so that the scale does not depend on the dead column
    other = weight.clone()
    other[:, dead] = -other[:, dead]
    found, moved = (method.quantize(it, grid_of(method), hessian).codes for it in (weight, other))
    assert torch.equal(found[:, dead], round_to_nearest(weight, grid_of(method)).codes[:, dead])
    others = torch.arange(32) != dead
    assert torch.equal(found[:, others], moved[:, others])


def test_fewer_tokens_than_channels_are_enough():
    token = draw(1, 32)
    ours, nearest = costs(GPTQ(group=None), draw(8, 32), 2 * token.T @ token)
    assert ours < nearest


def test_the_factor_is_of_the_damped_inverse():
    hessian = correlated(24)
    upper = inverse_factor(hessian, 0.01)
    assert torch.equal(upper, upper.triu())
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(24), atol=1e-3, rtol=0)


def test_damping_grows_until_the_factor_exists():
    lacking = torch.diag(torch.tensor([1.0, 1.0, 1.1, -0.1]))  # mean 0.75: damping by 1% is not enough
    upper = inverse_factor(lacking, 0.02)
    assert torch.isfinite(upper).all()
    assert (upper.diagonal() > 0).all()
    for hopeless in (torch.diag(torch.tensor([1.0, -1.0])), torch.full((4, 4), torch.nan)):
        with pytest.raises(ValueError, match="positive semi-definite"):
            inverse_factor(hopeless, 0.01)


def test_gptq_refuses_settings():
    for wrong in ({"percdamp": 0.0}, {"block": 0}, {"bits": 9}, {"samples": 0}):
        with pytest.raises(ValueError, match="must be"):
            GPTQ(**wrong)


def explicit(batches: list[torch.Tensor]) -> torch.Tensor:
    x = torch.cat([batch.flatten(0, -2) for batch in batches]).double()
    return (2 / len(x) * x.T @ x).float()


def test_hessians_are_means_over_all_batches():
    layers = {"linear": nn.Linear(6, 3), "conv": Conv1D(3, 6), "idle": nn.Linear(6, 3)}
    batches = [draw(2, rows, 6, seed=rows) * rows for rows in (1, 7, 3, 0, 2)]
    with hessians_of(layers) as seen:
        for batch in batches:
            layers["linear"](batch)
            layers["conv"](batch.clone())
        assert not seen.matrices
    assert set(seen.matrices) == set(seen.tokens) == {"linear", "conv"}
    for name in seen.matrices:
        assert seen.tokens[name] == 26
        assert seen.matrices[name].dtype == torch.float32
        torch.testing.assert_close(seen.matrices[name], explicit(batches))
    assert seen.matrices["linear"] is not seen.matrices["conv"]


def test_hessians_stay_exact_over_many_batches_in_half_precision():
    layer, batches = (
        nn.Linear(4, 2, dtype=torch.bfloat16),
        [draw(3, 4, seed=seed).bfloat16() for seed in range(300)],
    )
    with hessians_of({"layer": layer}) as seen:
        for batch in batches:
            layer(batch)
    torch.testing.assert_close(seen.matrices["layer"], explicit(batches), rtol=1e-5, atol=1e-6)


def test_layers_that_read_the_same_tensors_share_a_hessian():
    layers = {name: nn.Linear(6, 3) for name in "qkv"}
    batches = [draw(5, 6, seed=seed) for seed in range(3)]
    with hessians_of(layers) as seen:
        for batch in batches:
            for layer in layers.values():
                layer(batch)
    assert seen.matrices["q"] is seen.matrices["k"] is seen.matrices["v"]
    torch.testing.assert_close(seen.matrices["q"], explicit(batches))


def test_layers_part_where_their_inputs_do():
    layers = {name: nn.Linear(6, 3) for name in "qkv"}
    one, two, three = (draw(5, 6, seed=seed) for seed in range(3))
    fed = {"q": [one, two, three, three], "k": [one, three], "v": [one, two, one]}
    with hessians_of(layers) as seen:
        for layer in layers.values():
            layer(one)
        layers["q"](two)
        layers["v"](two)
        layers["q"](three)
        layers["k"](three)
        layers["q"](three)  # the same again, alone
        layers["v"](one)
    for name, batches in fed.items():
        assert seen.tokens[name] == 5 * len(batches)
        torch.testing.assert_close(seen.matrices[name], explicit(batches))


def test_a_tensor_that_changed_in_place_is_not_the_same():
    layers, batch = {name: nn.Linear(6, 3) for name in "ab"}, draw(5, 6)
    with torch.no_grad(), hessians_of(layers) as seen:
        layers["a"](batch)
        layers["b"](batch.mul_(2))
    torch.testing.assert_close(seen.matrices["b"], 4 * seen.matrices["a"])


def test_hooks_are_gone_after_an_exception():
    layer = nn.Linear(6, 3)
    with pytest.raises(RuntimeError), hessians_of({"layer": layer}):
        layer(draw(5, 4))
    assert not layer._forward_pre_hooks


def test_inputs_that_are_not_finite_are_refused_by_name():
    layer = nn.Linear(6, 3)
    with pytest.raises(StropError, match="up_proj reads NaN"), hessians_of({"mlp.up_proj": layer}):
        layer(torch.full((2, 6), torch.inf))
    assert not layer._forward_pre_hooks


def test_each_expert_counts_its_own_tokens():
    fused = SimpleNamespace(gate_up_proj=draw(4, 6, 8), down_proj=draw(4, 8, 3), act_fn=nn.SiLU())
    experts = Experts(fused)
    chosen = torch.tensor([[0, 2], [2, 0], [0, 3], [0, 2]])  # nobody asks expert 1
    hidden = draw(4, 8)
    layers = {name: layer for name, layer in experts.named_modules() if isinstance(layer, nn.Linear)}
    with hessians_of(layers) as seen:
        experts(hidden, chosen, torch.full((4, 2), 0.5))
    assert {name: count for name, count in seen.tokens.items() if "gate" in name} == {
        "0.gate_proj": 4,
        "2.gate_proj": 3,
        "3.gate_proj": 1,
    }
    assert not any(name.startswith("1.") for name in seen.matrices)
    assert seen.matrices["2.gate_proj"] is seen.matrices["2.up_proj"]
    torch.testing.assert_close(seen.matrices["2.gate_proj"], explicit([hidden[[0, 1, 3]]]))
    assert seen.matrices["2.down_proj"].shape == (3, 3)
