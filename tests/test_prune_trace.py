"""Tracing: the units of every model of the table, why the rest is frozen, and an outside tool that agrees."""

import pytest
import torch
from prune_models import MODELS, Fused, Loop, language, made, traced
from pruning import STREAM, WIDTHS, Net, branch, joint
from torch import nn

from strop.core.errors import StropError
from strop.prune.axes import Atom, freeze, fresh, leaves, regroup, root, size, unify
from strop.prune.trace import trace
from strop.prune.units import example_of


def found(name):
    return {unit.name: (unit.width, unit.heads, unit.kind, unit.where) for unit in traced(name)[1].units}


def layers(path, **widths):
    return {
        f"{path}.{i}.{name}": (width, 1, "inner", "block") for i in (0, 1) for name, width in widths.items()
    }


LLAMA = layers("model.layers", self_attn=2, mlp=48)
STEM = {f"stem.stages.{stage}": (4 << stage, 1, "inner", "stem") for stage in range(3)}
EXPECTED = {
    "heads": {"stream": (8, 1, "stream", "stem")}
    | {"qk": (8, 2, "inner", "stem"), "v": (8, 2, "inner", "stem")},
    "fused": {},
    "grouped": {"enter+depthwise": (3, 1, "inner", "stem"), "grouped": (20, 4, "inner", "stem")}
    | {"up": (9, 1, "inner", "stem")},
    "tied": {"stream": (8, 1, "stream", "stem"), "fc1": (12, 1, "inner", "stem")},
    "loop": {"stream": (6, 1, "stream", "stem"), "wide": (16, 1, "inner", "stem")},
    "gated": {"both": (12, 1, "inner", "stem")},
    "vit": layers("vit.layers", attention=4, mlp=48),
    "llama": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "phi3": layers("model.layers", mlp=48),
    "gpt2": layers("transformer.h", mlp=256),
    "sdt": STEM | {"stream": (32, 1, "stream", "stem")} | layers("blocks", attention=32, mlp=128),
    "spikformer": STEM
    | {"stream": (32, 1, "stream", "stem"), "blocks.0.mlp": (128, 1, "inner", "block")}
    | {f"blocks.0.attention.{part}": (32, 4, "inner", "block") for part in ("qk", "v")},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_units_are_those_of_the_architecture(name):
    assert found(name) == EXPECTED[name]


def test_the_pyramid_has_every_unit_of_its_blocks():
    units = found("sdt_v2")
    rep = [f"{part}.project.conv" for part in "qkv"] + ["projection.conv"]
    attention = dict.fromkeys(rep, (24, 1)) | {"qk": (24, 4), "v": (24, 4)}
    for block in (3, 4):
        assert {name: units[f"blocks.{block}.attention.{name}"][:2] for name in attention} == attention
        assert units[f"blocks.{block}.mlp"][0] == 96
    for block, width in enumerate((4, 8, 16)):
        assert units[f"blocks.{block}.separable"][0] == 2 * width
        assert units[f"blocks.{block}.channel"][0] == 4 * width
    streams = {name: width for name, (width, _, kind, _) in units.items() if kind == "stream"}
    assert streams == {f"stream.{number + 1}": width for number, width in enumerate((4, 8, 16, 24, 24))}
    assert len(units) == 5 + 3 * 2 + 2 * 7


def test_units_equal_those_written_by_hand():
    units = trace(Net())
    expected = [joint(0, first=True), joint(1), STREAM, *(branch(i, WIDTHS[f"blocks.{i}"]) for i in (0, 1))]
    assert [unit.name for unit in units.units] == [unit.name for unit in expected]
    for unit, other in zip(units.units, expected, strict=True):
        assert {*unit.axes} == {*other.axes}
        assert (unit.kind, unit.where, unit.first) == (other.kind, other.where, other.first)


def test_what_is_pruned_by_default_reads_no_input_and_is_no_stream():
    units = traced("sdt")[1]
    assert [unit.name for unit in units.units if unit.first] == ["stem.stages.0"]
    assert [unit.name for unit in units.streams()] == ["stream"]
    assert {unit.name for unit in units.free()} == {*EXPECTED["sdt"]} - {"stem.stages.0", "stream"}
    assert [unit.name for unit in units.blocks()] == [
        f"blocks.{block}.{part}" for block in (0, 1) for part in ("attention", "mlp")
    ]


def test_a_group_is_printed_in_full():
    unit = traced("llama")[1]["model.layers.0.self_attn"]
    assert unit.describe().splitlines() == [
        "model.layers.0.self_attn: 2 channels (inner, block)",
        "  producer  model.layers.0.self_attn.q_proj.weight  dim 0 = [2] x 2 x 2 x 8",
        "  producer  model.layers.0.self_attn.k_proj.weight  dim 0 = [2] x 2 x 8",
        "  producer  model.layers.0.self_attn.v_proj.weight  dim 0 = [2] x 16",
        "  consumer  model.layers.0.self_attn.o_proj.weight  dim 1 = [2] x 2 x 16",
    ]
    text = traced("sdt")[1].describe()
    assert all(axis.tensor in text for unit in traced("sdt")[1].units for axis in unit.axes)
    assert "frozen: head.weight[0]: it is the model's output" in text


@pytest.mark.parametrize(
    ("name", "place", "why"),
    [
        ("vit", "classifier.weight[0]", "the model's output"),
        ("vit", "vit.layers.0.mlp.fc1.weight[1]", "aten.native_layer_norm"),
        ("vit", "vit.layers.0.attention.v_proj", "does not run"),
        ("llama", "model.embed_tokens.weight[0]", "aten.embedding"),
        ("llama", "model.layers.1.input_layernorm.weight[0]", "aten.mean"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight[0]", "aten.slice"),
        ("gpt2", "transformer.h.0.attn.c_attn.1", "does not run"),
        ("gpt2", "transformer.h.0.attn.c_attn.weight[1]", "which cannot be cut"),
        ("sdt", "stem.stages.0.convolve.conv.weight[1]", "the model's input"),
        ("fused", "qkv.1", "the cut changes outputs by"),
    ],
)
def test_what_cannot_be_cut_is_listed_with_the_reason(name, place, why):
    assert why in dict(traced(name)[1].frozen)[place]


@pytest.mark.parametrize("name", MODELS)
def test_every_axis_of_a_parameter_is_in_a_unit_or_frozen(name):
    model, units = traced(name)
    cut = {(axis.tensor, axis.dim) for unit in units.units for axis in unit.axes}
    frozen = {place for place, _ in units.frozen}
    for tensor, parameter in model.named_parameters():
        channels = 2 if parameter.dim() == 4 else parameter.dim()  # the rest is a convolution's window
        for dim, length in enumerate(parameter.shape[:channels]):
            assert ((tensor, dim) in cut) + (f"{tensor}[{dim}]" in frozen) == (length > 1), (tensor, dim)


def test_experts_are_frozen_by_the_operation_that_is_not_known():
    torch.manual_seed(0)
    units = trace(language("mixtral").eval())
    assert [unit.name for unit in units.units] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    why = dict(units.frozen)["model.layers.0.mlp.experts.down_proj[2]"]
    assert why.startswith("aten.") and why.endswith("reads it whole")


def test_a_layer_that_is_used_twice_is_one_unit():
    unit = traced("tied")[1]["fc1"]
    assert [axis.tensor for axis in unit.axes] == ["fc1.weight", "fc1.bias", "fc2.weight"]
    embed = [axis for axis in traced("tied")[1]["stream"].axes if axis.tensor == "embed.weight"]
    assert [(axis.dim, axis.role) for axis in embed] == [(1, "consumer")]


def test_images_of_one_channel_are_read_by_an_ordinary_convolution():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    units = trace(model, {"input": torch.ones(1, 1, 6, 6)})
    assert [(unit.name, unit.width, unit.first) for unit in units.units] == [("0", 6, True)]
    assert [axis.role for axis in units["0"].axes] == ["producer", "tied", "consumer"]


def test_more_steps_change_no_unit():
    few, many = Loop(), Loop()
    many.shape = (7, *Loop.shape[1:])
    assert trace(few).units == trace(many).units


def test_a_model_that_says_nothing_of_its_input_needs_an_example():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(StropError, match="pass example="):
        trace(model)
    units = trace(model, {"input": torch.ones(1, 3)})
    assert [(unit.name, unit.width, unit.first) for unit in units.units] == [("0", 8, True)]
    with pytest.raises(StropError, match="the model does not run on the example"):
        trace(model, {"input": torch.ones(1, 4)})


@pytest.mark.parametrize("scale", [1.0, 1e-7])
def test_what_cannot_be_cut_shows_however_small_the_outputs_are(scale):
    class Scaled(Fused):
        def forward(self, x):
            return super().forward(x) * scale

    torch.manual_seed(0)
    units = trace(Scaled().eval())
    assert units.units == () and "the cut changes outputs by" in dict(units.frozen)["qkv.1"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["fused", "llama", "tied", "sdt"])
def test_short_numbers_change_no_unit(name, dtype):
    model = made(name, dtype)
    expected = traced(name)[1]
    for units in (trace(model), trace(model, example_of(model))):
        assert units.units == expected.units
        assert [place for place, _ in units.frozen] == [place for place, _ in expected.frozen]
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}


def test_a_model_without_parameters_has_nothing_to_find():
    with pytest.raises(StropError, match="pass example="):
        trace(nn.ReLU())
    assert trace(nn.ReLU(), {"input": torch.ones(2)}).units == ()


def test_examples_are_the_same_at_every_call():
    for name in ("vit", "llama", "sdt"):
        one, other = (example_of(traced(name)[0]) for _ in range(2))
        assert all(torch.equal(one[key], other[key]) for key in one if key != "use_cache")


def test_splitting_one_axis_splits_its_class():
    one, other = fresh(12), fresh(12)
    unify(one, other)
    assert [atom.size for atom in leaves(one)] == [12]
    heads, width = regroup(one, (3, 4))
    assert [size(heads), size(width)] == [3, 4] and [atom.size for atom in leaves(other)] == [3, 4]
    freeze(heads, "why")
    assert [root(atom).frozen for atom in leaves(other)] == ["why", None]


def test_factors_are_lined_up_and_those_that_cannot_be_are_frozen():
    coarse, fine = (Atom(4), Atom(3)), (Atom(2), Atom(6))
    unify(coarse, fine)
    assert [atom.size for atom in leaves(coarse)] == [atom.size for atom in leaves(fine)] == [2, 2, 3]
    assert [root(a) is root(b) for a, b in zip(leaves(coarse), leaves(fine), strict=True)] == [True] * 3
    assert regroup((Atom(6),), (4, 2)) is None
    one, other = (Atom(2), Atom(3)), (Atom(3), Atom(2))
    unify(one, other)
    assert all("do not fit" in root(atom).frozen for atom in leaves(one + other))


def test_an_addition_of_two_producers_is_a_stream_and_of_one_is_not():
    one, other, plain = fresh(5), fresh(5), fresh(5)
    root(one[0]).produced = root(other[0]).produced = True
    unify(one, plain, adds=True)
    assert not root(one[0]).stream
    unify(one, other, adds=True)
    assert root(plain[0]).stream


def groups_of(torch_pruning, model, conv):
    """What torch-pruning would cut with the outputs of a convolution: `(tensor, dimension)`."""
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs=example_of(model)["images"]
    )
    group = graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, idxs=[0])
    named = {module: name for name, module in model.named_modules()}
    held = set()
    for dependency, _ in group.items:
        module = dependency.target.module
        if module not in named:
            continue
        inputs = dependency.handler.__name__.endswith("in_channels")
        if isinstance(module, nn.BatchNorm2d):
            held |= {(f"{named[module]}.{part}", 0) for part in ("weight", "bias")}
            held |= {(f"{named[module]}.{part}", 0) for part in ("running_mean", "running_var")}
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            held.add((f"{named[module]}.weight", 1 if inputs else 0))
            held |= {(f"{named[module]}.bias", 0)} if module.bias is not None and not inputs else set()
    return held


def test_torch_pruning_finds_the_same_groups():
    torch_pruning = pytest.importorskip("torch_pruning")
    model = made("sdt")
    for name in EXPECTED["sdt"]:
        unit = traced("sdt")[1][name]
        producer = next(axis for axis in unit.axes if axis.role == "producer")
        conv = model.get_submodule(producer.tensor.removesuffix(".weight"))
        with torch.enable_grad():
            assert groups_of(torch_pruning, model, conv) == {*unit.places()}, name
