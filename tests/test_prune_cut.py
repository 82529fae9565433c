"""Cutting: the same as a mask for units of every model of the table; exact counts; nothing else touched."""

import copy
from dataclasses import replace

import pytest
import torch
from prune_models import MODELS, distinct, half, made, traced
from torch import nn

from strop.core.errors import StropError
from strop.prune.cut import cut, difference, masked, outputs, removed, tensors
from strop.prune.trace import trace
from strop.prune.units import Units, example_of

CUTTABLE = [name for name in MODELS if name != "fused"]


def sizes(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", CUTTABLE)
def test_a_cut_equals_a_mask(name):
    model, units = traced(name)
    assert difference(model, units, half(units.units), example_of(model)) < 1e-5
    wide = copy.deepcopy(model).double()
    for kept in [half([unit]) for unit in distinct(units)] + [half(units.units)]:
        assert difference(wide, units, kept, example_of(wide)) < 1e-14


@pytest.mark.parametrize("name", CUTTABLE)
@torch.no_grad()
def test_a_mask_of_any_unit_changes_the_output(name):
    model, units = traced(name)
    whole = outputs(model, example_of(model))[0]
    for unit in distinct(units):
        zeroed = outputs(masked(model, units, half([unit])), example_of(model))[0]
        assert (zeroed - whole).abs().max() > 1e-3, unit.name


@pytest.mark.parametrize("name", CUTTABLE)
def test_sequential_cuts_equal_a_joint_one(name):
    model, units = traced(name)
    kept = half(units.units)
    joint, step = cut(model, units, kept), model
    for unit in units.units:
        now = trace(step) if step is not model and name in ("heads", "grouped", "llama") else units
        step = cut(step, now, {unit.name: kept[unit.name]})
    for one, other in zip(joint.state_dict().values(), step.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", CUTTABLE)
def test_the_count_of_removed_parameters_is_that_of_the_cut_model(name):
    model, units = traced(name)
    for share in (0.25, 0.5, 0.75):
        kept = half(units.units, share)
        counts = {name: len(indices) for name, indices in kept.items()}
        assert removed(model, units, counts) == sizes(model) - sizes(cut(model, units, kept)) > 0
    assert removed(model, units, {unit.name: unit.width for unit in units.units}) == 0


@pytest.mark.parametrize("name", ["tied", "sdt", "llama"])
def test_the_model_stays_as_it_is_and_shares_what_is_not_cut(name):
    model = made(name).train()
    next(iter(model.children())).eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    units = trace(model)
    unit = units.units[-1]
    thin = cut(model, units, half([unit]))
    difference(model, units, half(units.units), example_of(model))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [module.training for module in thin.modules()] == modes
    touched, whole = {axis.tensor for axis in unit.axes}, tensors(model)
    for key, tensor in tensors(thin).items():
        assert (tensor is whole[key]) == (key not in touched)
        assert tensor.requires_grad == whole[key].requires_grad


@pytest.mark.parametrize("name", CUTTABLE)
@torch.no_grad()
def test_a_state_dict_of_a_cut_model_loads_back(name):
    model, units = traced(name)
    kept = half(units.units)
    first, second = cut(model, units, kept), copy.deepcopy(cut(model, units, kept))
    for parameter in second.parameters():
        parameter.zero_()
    second.load_state_dict(first.state_dict())
    example = example_of(model)
    assert torch.equal(outputs(first, example)[0], outputs(second, example)[0])


def test_modules_know_their_new_sizes():
    model, units = traced("grouped")
    thin = cut(model, units, half(units.units))
    for layer in (module for module in thin.modules() if isinstance(module, nn.Conv2d)):
        assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)
    assert (thin.norm.num_features, thin.depthwise.groups, thin.grouped.groups) == (4, 4, 4)
    assert (thin.up.in_channels, thin.up.out_channels) == thin.up.weight.shape[:2] == (8, 4)
    assert (thin.head.out_features, thin.head.in_features) == thin.head.weight.shape == (5, 4 * 36)
    model, units = traced("gpt2")
    layer = cut(model, units, half(units.units)).transformer.h[0].mlp.c_fc
    assert (layer.nx, layer.nf) == layer.weight.shape == (64, 128)


def test_depthwise_convolutions_lose_groups():
    model, units = traced("sdt_v2")
    unit = units["blocks.0.separable"]
    thin = cut(model, units, half([unit]))
    depthwise = thin.get_submodule("blocks.0.separable.contract.conv.depthwise")
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == unit.width // 2


def test_queries_and_keys_keep_the_same_channels_and_as_many_in_every_head():
    model, units = traced("spikformer")
    kept = half([units["blocks.0.attention.qk"]])
    thin = cut(model, units, kept)
    ((name, indices),) = kept.items()
    each = units[name].width // units[name].heads
    assert (indices // each).bincount().unique().tolist() == [each // 2]
    assert len({tuple(head) for head in (indices % each).view(units[name].heads, -1).tolist()}) > 1
    for part in ("q", "k"):
        place = f"blocks.0.attention.{part}.project.conv.weight"
        assert torch.equal(thin.get_parameter(place), model.get_parameter(place)[indices])


def test_a_tied_matrix_is_cut_once_and_stays_tied():
    model, units = traced("tied")
    thin = cut(model, units, half(units.units))
    assert thin.head.weight is thin.embed.weight
    assert thin.embed.weight.shape == (11, 4) and thin.embed.embedding_dim == thin.head.in_features == 4


@torch.no_grad()
def test_a_cut_language_model_writes_what_the_masked_one_does():
    model, units = traced("llama")
    prompt = {"input_ids": torch.tensor([[5, 9, 2]]), "max_new_tokens": 12, "do_sample": False}
    thin, dense = (way(model, units, half(units.units)) for way in (cut, masked))
    assert torch.equal(thin.generate(**prompt), dense.generate(**prompt))
    assert not torch.equal(thin.generate(**prompt), model.generate(**prompt))


@pytest.mark.parametrize("name", ["sdt", "llama", "heads"])
def test_a_group_without_one_of_its_axes_does_not_pass(name):
    model, units = traced(name)
    for unit in units.free()[-2:]:
        for axis in unit.axes:
            wrong = replace(unit, axes=tuple(other for other in unit.axes if other != axis))
            try:
                assert difference(model, Units((wrong,), ()), half([unit]), example_of(model)) > 1e-2, axis
            except StropError as error:
                assert "the cut model does not run" in str(error)


def test_queries_and_keys_cut_apart_do_not_pass():
    """Their shapes still fit, so only the numbers can tell."""
    model, units = traced("heads")
    unit = units["qk"]
    parts = [
        replace(unit, name=part, axes=tuple(axis for axis in unit.axes if axis.tensor.startswith(part)))
        for part in ("q", "k")
    ]
    apart = Units(tuple(parts), ())
    same = half([unit])[unit.name]
    assert difference(model, apart, {"q": same, "k": same}, example_of(model)) < 1e-6
    other = torch.tensor([index for index in range(unit.width) if index not in same])
    assert difference(model, apart, {"q": same, "k": other}, example_of(model)) > 1e-3


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        ([0, 1, 2], "equally many channels in each of its 2 heads"),
        ([1, 0], "ascending"),
        ([0, 8], "0 to 7"),
        ([-1, 5], "0 to 7"),
        ([], "one or more"),
    ],
)
def test_channels_that_cannot_be_kept_are_refused(indices, said):
    model, units = traced("heads")
    with pytest.raises(StropError, match=said):
        cut(model, units, {"qk": torch.tensor(indices)})


def test_an_unknown_unit_is_refused():
    model, units = traced("heads")
    with pytest.raises(StropError, match="did you mean 'qk'"):
        cut(model, units, {"qkk": torch.tensor([0])})


def test_whole_heads_are_rounded_by_what_they_take_out_of_an_axis():
    free = traced("llama")[1].free()
    attention, mlp = (next(unit for unit in free if part in unit.name) for part in ("attn", "mlp"))
    entries = min(axis.size for axis in attention.axes) // attention.width
    assert entries > 1 and attention.step(entries) == 1 and attention.step(2 * entries) == 2
    assert mlp.step(8) == 8
