"""The weights family: one table over methods, architectures and dtypes; splitting experts; refusals."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from quantizing import EXPERTS, build, experts_of, logits, memory, packed_layers, rows
from torch import nn
from transformers.pytorch_utils import Conv1D

from strop.core.errors import StropError
from strop.weights import GPTQ, HQQ, PMQ, RTN, AlphaQ, WeightMethod
from strop.weights.base import targets
from strop.weights.experts import Experts, split_experts
from strop.weights.grid import Codes, Grid
from strop.weights.linear import PackedLinear

W4 = RTN(bits=4, group=32, symmetric=False)
METHODS: dict[str, WeightMethod] = {
    "int8": RTN(bits=8),
    "int4": RTN(bits=4, group=32),
    "int3-asymmetric": RTN(bits=3, group=32, symmetric=False),
    "int1": RTN(bits=1, group=32),
    "gptq": GPTQ(bits=4, group=32),
    "hqq": HQQ(bits=4, group=32),
    "alphaq": AlphaQ(bits=2.5, widths=(1, 2, 3, 4), quantizer=W4),
    "pmq": PMQ(bits=2.5, widths=(2, 3, 4), quantizer=W4),
}
DENSE, MIXED = ("qwen3", "llama", "gpt2"), ("qwen2_moe", "mixtral")
DTYPES = [torch.float32, torch.bfloat16]
CASES = [
    pytest.param(method, architecture, dtype, id=f"{name}-{architecture}-{str(dtype)[6:]}")
    for name, method in METHODS.items()
    for architecture in (MIXED if name in ("alphaq", "pmq") else DENSE + MIXED)
    for dtype in DTYPES
]


def quantize(method: WeightMethod, model: nn.Module) -> nn.Module:
    if isinstance(method, HQQ):
        pytest.importorskip("hqq")
    return method.apply(model, rows)


@pytest.mark.parametrize(("method", "architecture", "dtype"), CASES)
def test_every_member(method, architecture, dtype):
    """Logits are those of the dequantized matrices, memory is codes, scales and zeros, the plan names each
    matrix once, and neither the model nor a copy is touched."""
    model = build(architecture, dtype)
    before, size = logits(model), memory(model)
    packed = quantize(method, copy.deepcopy(model))
    plan = method.plan(method.walk(copy.deepcopy(model), rows))
    layers, after = packed_layers(packed), logits(packed)
    assert torch.equal(logits(model), before) and not packed_layers(model)

    dense = copy.deepcopy(model)
    split_experts(dense)
    assert list(layers) == [row.name for row in plan.rows] == list(targets(dense))
    for row in plan.rows:
        layer = dense.get_submodule(row.name)
        assert (layers[row.name].grid, row.shape) == (row.grid, layers[row.name].codes.shape)
        outputs, inputs = row.shape
        stored = 1 if row.grid.symmetric else 2
        groups = outputs * (inputs // (row.grid.group or inputs))
        held = outputs * inputs * row.grid.bits // 8 + stored * groups * dtype.itemsize
        assert sum(buffer.nbytes for buffer in layers[row.name].buffers()) == held
        size += held - outputs * inputs * dtype.itemsize
        if dtype.itemsize == 2:
            assert row.effective_bits == pytest.approx(8 * held / (outputs * inputs))
        weight = layers[row.name].weight
        assert weight.dtype == dtype
        layer.weight.data = weight.T if isinstance(layer, Conv1D) else weight
    assert memory(packed) == size
    assert not torch.equal(before, after)
    exact = architecture not in ("gpt2", *EXPERTS)  # which may multiply by other functions than F.linear
    tolerance = 0 if exact else 5e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(after, logits(dense), rtol=0, atol=tolerance)

    twin = copy.deepcopy(packed)
    for layer in packed_layers(twin).values():
        layer.scale.zero_()
    assert torch.equal(logits(packed), after)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_linear_round_trip(bits, symmetric, dtype):
    torch.manual_seed(0)
    grid = Grid(bits, 8, symmetric)
    codes = torch.randint(0, 2**bits, (6, 32), dtype=torch.uint8)
    scale = torch.rand(6, 4, dtype=dtype)
    zero = None if symmetric else torch.randint(0, 2**bits, (6, 4)).to(dtype)
    bias = nn.Parameter(torch.randn(6, dtype=dtype))
    layer = PackedLinear(Codes(codes.clone(), scale, zero), grid, bias)
    middle = 0.5 if bits == 1 else 2 ** (bits - 1)
    offset = middle if zero is None else zero.repeat_interleave(8, dim=1)
    dense = (codes.to(dtype) - offset) * scale.repeat_interleave(8, dim=1)
    x = torch.randn(3, 5, 32, dtype=dtype)
    assert layer.packed.nbytes == 6 * 32 * bits // 8
    assert torch.equal(layer.codes, codes)
    assert torch.equal(layer.weight, dense)
    assert torch.equal(layer(x), F.linear(x, dense, bias))


@pytest.mark.parametrize("architecture", EXPERTS)
def test_split_experts_are_the_fused_ones(architecture):
    model = build(architecture, experts_implementation="eager")
    fused, size = logits(model), memory(model)
    layer = 1 if architecture == "deepseek_v2" else 0
    gate_up, down = experts_of(model, layer).gate_up_proj.detach(), experts_of(model, layer).down_proj
    split_experts(model)
    torch.testing.assert_close(logits(model), fused, rtol=0, atol=1e-5)
    split = experts_of(model, layer)
    assert isinstance(split, Experts) and len(split) == 4
    assert torch.equal(torch.cat([split[2].gate_proj.weight, split[2].up_proj.weight]), gate_up[2])
    assert torch.equal(split[2].down_proj.weight, down[2])
    assert memory(model) == size  # nothing is copied
    with torch.no_grad():
        split[1].down_proj.weight.zero_()
    assert not torch.equal(logits(model), fused)


def test_targets_leave_head_embeddings_and_routers_alone():
    model = build("qwen2_moe")
    split_experts(model)
    kinds = {name.rpartition(".")[2] for name in targets(model)}
    assert kinds == {f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")}
    assert len(targets(model)) == 2 * (4 + 3 * 4 + 3)
    routers = [m for name, m in model.named_modules() if name.endswith((".gate", "shared_expert_gate"))]
    assert len(routers) == 4 and not {id(router) for router in routers} & {*map(id, targets(model).values())}


@pytest.mark.parametrize("odd", ["has_bias", "is_concatenated", "has_gate"])
def test_refuses_experts_that_it_would_compute_wrongly(odd):
    model = build("mixtral")
    setattr(experts_of(model), odd, odd == "has_bias")
    with pytest.raises(StropError, match=r"model\.layers\.0\.mlp\.experts has experts with .*does not split"):
        RTN().apply(model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", [RTN(), AlphaQ(quantizer=W4)], ids=["rtn", "alphaq"])
def test_refuses_non_finite_weights_and_quantizes_nothing(value, method):
    model = build("mixtral")
    with torch.no_grad():
        experts_of(model, 1).gate_up_proj[3, 5, 7] = value
    with pytest.raises(StropError, match=r"model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight holds NaN"):
        method.apply(model)
    assert not packed_layers(model)


def test_refuses_rows_that_do_not_divide():
    with pytest.raises(StropError, match=r"down_proj has 96 input channels.*group=64"):
        RTN(bits=4, group=64).apply(build("llama"))
    for bits, fits in ((8, True), (4, False), (3, False)):
        model = build("llama")
        model.model.layers[0].self_attn.q_proj = nn.Linear(63, 64)
        if fits:
            assert packed_layers(RTN(bits=bits).apply(model))
            continue
        with pytest.raises(StropError, match=r"q_proj has 63 input channels.*whole bytes"):
            RTN(bits=bits).apply(model)
        assert not packed_layers(model)


def test_refuses_models_without_dense_linear_layers():
    with pytest.raises(StropError, match="already quantized"):
        RTN().apply(RTN().apply(build("llama")))
    model = build("llama")
    for name in targets(model):
        model.set_submodule(name, nn.Identity())
    with pytest.raises(StropError, match=r"no nn\.Linear"):
        RTN().apply(model)


def test_refuses_matrices_that_are_shared():
    model = build("llama")
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(StropError, match=r"layers\.1\.self_attn\.q_proj and .*0.* share one matrix"):
        RTN().apply(model)
    with torch.device("meta"):
        skeleton = copy.deepcopy(model).to("meta")
    skeleton.model.layers[1].self_attn.q_proj.weight = skeleton.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(StropError, match="share one matrix"):
        targets(skeleton)


def test_calibrated_methods_need_text():
    with pytest.raises(ValueError, match="GPTQ needs calibration text"):
        GPTQ(group=32).apply(build("llama"))
    with pytest.raises(ValueError, match="AlphaQ needs calibration text"):
        AlphaQ(quantizer=GPTQ(group=32)).apply(build("mixtral"))


def test_calibration_sees_each_layer_behind_quantized_ones():
    """Hessians of the second layer are those of the first one's packed output."""
    method = GPTQ(bits=2, group=32)
    seen = {}

    class Spy(GPTQ):
        def quantize(self, weight, grid, hessian=None):
            seen[len(seen)] = hessian.clone()
            return super().quantize(weight, grid, hessian)

    model = build("llama")
    last = len(targets(model)) - 1
    Spy(bits=2, group=32).apply(copy.deepcopy(model), rows)
    packed = method.apply(copy.deepcopy(model), rows)
    reads = []
    down = packed.model.layers[1].mlp.down_proj
    dense = copy.deepcopy(model).model.layers[1]
    packed.model.layers[1] = dense  # as it was when it was seen
    dense.mlp.down_proj.register_forward_pre_hook(lambda module, args: reads.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        packed(rows(None))
    x = torch.cat(reads)
    torch.testing.assert_close(seen[last], 2 * x.T @ x / len(x), rtol=1e-3, atol=1e-4)
    assert down.grid == Grid(2, 32)


@pytest.mark.parametrize(
    "fields", [{"bits": 0}, {"bits": 9}, {"bits": 16}, {"group": 0}, {"group": -1}], ids=str
)
def test_rtn_checks_its_fields(fields):
    with pytest.raises(ValueError, match="must be"):
        RTN(**fields)
    with pytest.raises(ValueError, match="must be"):
        dataclasses.replace(GPTQ(), **fields)
