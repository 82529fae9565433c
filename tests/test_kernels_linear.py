"""The CPU kernel that multiplies by packed codes, against its torch twin, and when it is used."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strop.core.bits import pack, unpack
from strop.kernels import linear, linear_numba
from strop.weights.grid import Codes, Grid, round_to_nearest
from strop.weights.linear import PackedLinear

GROUPS = (None, 128, 64, 32, 16, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_width = pytest.mark.parametrize("bits", range(1, 9))
every_group = pytest.mark.parametrize("group", GROUPS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_matrix(bits=4, group=None, symmetric=True, dtype=torch.float32, shape=(24, 384)):
    """What kernels are told of a matrix: packed codes, scale, zero, bias, width of a code."""
    weight = normal(*shape).to(dtype) + (0 if symmetric else 0.3)
    codes, scale, zero = round_to_nearest(weight, Grid(bits, group, symmetric))
    return pack(codes, bits), scale, zero, normal(shape[0], seed=1).to(dtype), bits


def layer(group=None, bias=False, dtype=torch.float32, inputs=128, bits=4) -> PackedLinear:
    grid = Grid(bits, group)
    given = nn.Parameter(normal(16, seed=1).to(dtype), requires_grad=False) if bias else None
    return PackedLinear(round_to_nearest(normal(16, inputs).to(dtype), grid), grid, given)


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the inputs that the kernel was given."""
    found, multiply = [], linear_numba.multiply
    monkeypatch.setattr(
        linear_numba, "multiply", lambda x, *given: (found.append(x.shape), multiply(x, *given))[1]
    )
    return found


@every_width
@every_group
@pytest.mark.parametrize("symmetric", [True, False])
@every_dtype
def test_the_product_is_that_of_the_twin(bits, group, symmetric, dtype):
    given = packed_matrix(bits, group, symmetric, dtype)
    x = normal(5, 384, seed=2).to(dtype)
    got, want = linear_numba.multiply(x, *given), linear.multiply(x, *given)
    assert got.shape == (5, 24) and got.dtype == dtype
    within = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (got.float() - want.float()).abs().max() <= within * want.float().abs().max()


@every_width
@every_group
def test_whole_numbers_are_multiplied_exactly(bits, group):
    generator = torch.Generator().manual_seed(bits)
    groups = 1 if group is None else 384 // group
    codes = torch.randint(2**bits, (24, 384), generator=generator, dtype=torch.uint8)
    scale = torch.randint(1, 4, (24, groups), generator=generator).float()
    zero = torch.randint(2**bits, (24, groups), generator=generator).float()
    x = torch.randint(-9, 10, (6, 384), generator=generator).float()
    weight = ((codes.unflatten(1, (groups, -1)) - zero[..., None]) * scale[..., None]).flatten(1)
    assert torch.equal(linear_numba.multiply(x, pack(codes, bits), scale, zero, None, bits), x @ weight.T)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_narrow_result_is_rounded_once(dtype):
    packed, scale, zero, bias, bits = packed_matrix(3, 64, False, dtype)
    x = normal(5, 384, seed=2).to(dtype)
    wide = linear_numba.multiply(x.float(), packed, scale.float(), zero.float(), bias.float(), bits)
    assert torch.equal(linear_numba.multiply(x, packed, scale, zero, bias, bits), wide.to(dtype))


@every_width
@pytest.mark.parametrize("symmetric", [True, False])
@every_dtype
def test_a_row_does_not_depend_on_the_others(bits, symmetric, dtype):
    given = packed_matrix(bits, 64, symmetric, dtype)
    x = normal(9, 384, seed=2).to(dtype)
    together = linear_numba.multiply(x, *given)
    alone = torch.cat([linear_numba.multiply(row[None], *given) for row in x])
    assert torch.equal(together, alone)
    assert torch.equal(together[3:], linear_numba.multiply(x[3:], *given))


def test_work_split_over_threads_gives_the_same(monkeypatch):
    given, x = packed_matrix(5, 32, False), normal(5, 384, seed=2)
    want = linear_numba.multiply(x, *given)
    monkeypatch.setattr(linear_numba, "workers", lambda work: 5)
    assert torch.equal(linear_numba.multiply(x, *given), want)


def test_callers_in_threads_do_not_disturb_one_another():
    given, x = packed_matrix(4, 128), normal(3, 384, seed=2)
    want = linear_numba.multiply(x, *given)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: linear_numba.multiply(x, *given), range(64)))
    assert all(torch.equal(got, want) for got in found)


def test_shapes_and_strides():
    given, x = packed_matrix(4, 128), normal(2, 3, 384, seed=2)
    want = linear_numba.multiply(x, *given)
    assert want.shape == (2, 3, 24)
    assert torch.equal(linear_numba.multiply(x[1, 2], *given), want[1, 2])
    assert torch.equal(linear_numba.multiply(x.transpose(0, 1), *given), want.transpose(0, 1))
    wide = normal(2, 3, 768, seed=3)
    wide[..., ::2] = x
    assert torch.equal(linear_numba.multiply(wide[..., ::2], *given), want)
    assert linear_numba.multiply(x[:0], *given).shape == (0, 3, 24)
    packed, scale, zero, bias, bits = given
    strided = packed.T.contiguous().T, scale.T.contiguous().T, zero, bias, bits
    assert torch.equal(linear_numba.multiply(x, *strided), want)


@every_dtype
def test_numbers_that_are_none_stay_in_their_row(dtype):
    given, x = packed_matrix(8, None, True, dtype), normal(4, 384, seed=2).to(dtype)
    want = linear_numba.multiply(x, *given)
    x[1, 7], x[2, 9] = torch.nan, torch.inf
    got = linear_numba.multiply(x, *given)
    assert torch.isnan(got[1]).all() and not torch.isfinite(got[2]).any()
    assert torch.equal(got[[0, 3]], want[[0, 3]])


@every_dtype
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_gives_few_rows_to_the_kernel(calls, dtype, bias):
    packed, x = layer(128, bias, dtype), normal(linear.ROWS + 1, 128, seed=2).to(dtype)
    few = packed(x[:-1])
    assert calls == [(linear.ROWS, 128)]
    assert torch.equal(packed(x), F.linear(x, packed.weight, packed.bias)) and len(calls) == 1
    want = linear.multiply(x, packed.packed, packed.scale, packed.zero, packed.bias, 4)
    assert (few - want[:-1]).abs().max() <= (2e-6 if dtype == torch.float32 else 8e-3) * want.abs().max()


def test_a_layer_keeps_to_the_dense_product_where_gradients_are_asked_for(calls):
    packed, x = layer(bias=True), normal(2, 128, seed=2).requires_grad_()
    packed(x).sum().backward()
    assert torch.equal(x.grad, packed.weight.sum(0).expand(2, -1))
    packed.bias.requires_grad_()
    packed(x.detach()).sum().backward()
    assert torch.equal(packed.bias.grad, torch.full((16,), 2.0))
    assert not calls
    with torch.no_grad():
        packed(x)
    with torch.inference_mode():
        packed(x.detach())
    assert len(calls) == 2


def test_what_a_layer_leaves_to_torch(calls):
    x = normal(2, 128, seed=2)
    assert layer().to("meta")(x.to("meta")).shape == (2, 16)
    assert layer(inputs=96)(normal(2, 96)).shape == (2, 16)
    assert layer(group=4)(x).shape == (2, 16)
    for wrong in (x.double(), normal(2, 64), x.half()):
        with pytest.raises(RuntimeError):
            layer()(wrong)
    assert not calls


def test_a_layer_without_numba_dequantizes(calls, monkeypatch):
    monkeypatch.setattr(linear, "find_spec", lambda name: None)
    linear.kernels.cache_clear()
    try:
        packed, x = layer(), normal(2, 128, seed=2)
        assert torch.equal(packed(x), F.linear(x, packed.weight)) and not calls
    finally:
        linear.kernels.cache_clear()


def test_moved_and_replaced_buffers_are_read_anew():
    packed, x = layer(), normal(2, 128, seed=2)
    packed(x)
    packed.scale *= 2
    doubled = packed(x)
    packed.packed = pack(15 - unpack(packed.packed, 4), 4)
    packed.zero = torch.full_like(packed.scale, 7.0)
    torch.testing.assert_close(packed(x), -doubled)
    half = packed.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_the_twin_multiplies_by_what_the_codes_stand_for():
    codes = Codes(torch.tensor([[0, 3, 1, 2]], dtype=torch.uint8), torch.tensor([[2.0, 0.5]]), None)
    given = pack(codes.codes, 2), codes.scale
    assert linear.multiply(torch.eye(4), *given, None, None, 2).flatten().tolist() == [-4.0, 2.0, -0.5, 0.0]
    zero, bias = torch.tensor([[1.0, 0.0]]), torch.tensor([1.0])
    assert linear.multiply(torch.eye(4), *given, zero, bias, 2).flatten().tolist() == [-1.0, 5.0, 1.5, 2.0]
    ones = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1]], dtype=torch.uint8)
    assert linear.multiply(torch.ones(1, 8), pack(ones, 1), torch.ones(1, 1), None, None, 1).item() == 2.0
