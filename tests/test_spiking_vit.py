"""Spiking transformers: published sizes, spikes where they must be, folders, and released checkpoints."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from spikes import CONFIGS, spiking
from torch import nn
from torch.nn import functional as F

from strop.core.errors import StropError
from strop.models.spiking import LIF
from strop.models.spiking_config import MOST, SpikingConfig
from strop.models.spiking_convert import convert_sdt_v2
from strop.models.spiking_saved import build, from_folder, load_weights, read_config, save
from strop.models.spiking_vit import ConvNorm, Gate, Products, RepConv, SpikingTransformer

SIZES = [
    (SpikingConfig.sdt(8, 384), 16.82),
    (SpikingConfig.sdt(6, 512), 23.37),
    (SpikingConfig.sdt(10, 512), 36.01),
    (SpikingConfig.sdt(8, 768), 66.34),
    (SpikingConfig.sdt(2, 512, pools="0011", classes=10), 10.23),
    (SpikingConfig.spikformer(4, 384, heads=12, pools="0011", classes=10), 9.3),
    (SpikingConfig.sdt_v2(), 15.11),
    (SpikingConfig.sdt_v2((96, 192, 384, 480)), 31.33),
    (SpikingConfig.sdt_v2((128, 256, 512, 640)), 55.35),
]


def bits(x):
    return bool(((x == 0) | (x == 1)).all())


@pytest.mark.parametrize(("config", "millions"), SIZES)
def test_published_shapes_have_their_published_sizes(config, millions):
    with torch.device("meta"):
        model = SpikingTransformer(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_run_and_every_neuron_fires(name):
    model, rates = spiking(name), {}
    for at, neuron in model.named_modules():
        if isinstance(neuron, LIF):
            neuron.register_forward_hook(lambda _m, _a, out, at=at: rates.update({at: out.mean().item()}))
    model.train()(**model.example()).square().sum().backward()
    assert all(0 < rate < 1 for rate in rates.values()), rates
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ("sdt", "linear", "sdt_v2"))
def test_with_a_membrane_residual_every_convolution_reads_spikes(name):
    model, read = spiking(name), {}
    for at, conv in model.named_modules():
        if isinstance(conv, ConvNorm):
            conv.register_forward_hook(lambda _m, args, _o, at=at: read.update({at: args[0]}))
    with torch.no_grad():
        model(**model.example())
    first = {"stem", "stem.stages.0.convolve"} & read.keys()
    assert {at for at, x in read.items() if not bits(x)} == first and len(first) == 1


def test_a_spike_residual_adds_spikes_up():
    model, streams = spiking("spikformer"), []
    for block in (model.stem, *model.blocks):
        block.register_forward_hook(lambda _m, _a, out: streams.append(out))
    with torch.no_grad():
        model(**model.example())
    assert all(torch.equal(x, x.round()) and x.min() >= 0 for x in streams)
    assert max(x.max() for x in streams) > 1


@pytest.mark.parametrize("name", CONFIGS)
def test_still_images_are_shown_at_every_step_and_inputs_do_not_mix(name):
    model = spiking(name, torch.float64)
    image = model.example()["images"][:, 0]
    with torch.no_grad():
        shown = model(images=image)
        assert torch.equal(shown, model(images=image.unsqueeze(1).expand(-1, model.config.steps, -1, -1, -1)))
        torch.testing.assert_close(model(images=image[1:]), shown[1:], rtol=0, atol=1e-12)
        steps = model.logits(image)
    assert torch.equal(steps.mean(0), shown) and len(steps) == model.config.steps


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_sees_no_later_frame(name):
    model = spiking(name, torch.float64)
    images = model.example()["images"]
    other = images.clone()
    other[:, 2:] = images[:, 2:].flip(-1) + 1
    with torch.no_grad():
        before, after = model.logits(images), model.logits(other)
    torch.testing.assert_close(before[:2], after[:2], rtol=0, atol=1e-12)
    assert (before[2] - after[2]).abs().max() > 1e-3


def test_batch_norms_pool_over_steps_and_images():
    layer, x = ConvNorm(nn.Conv2d(2, 3, 1), 3), torch.randn(4, 5, 2, 3, 3)
    out = layer(x)
    torch.testing.assert_close(out.mean((0, 1, 3, 4)), torch.zeros(3), atol=1e-6, rtol=0)
    through = layer.conv(x.flatten(0, 1))
    torch.testing.assert_close(layer.norm.running_mean, 0.1 * through.mean((0, 2, 3)))


def test_heads_change_nothing_for_the_gate_and_something_for_products():
    for name, same in (("sdt", True), ("linear", False)):
        model = spiking(name)
        other = SpikingTransformer(replace(model.config, heads=4)).eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(model(**model.example()), other(**model.example())) == same


def spikes_of(width, steps=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(3, steps, 2, width, 3, 2, generator=draw) < 0.4).float().unbind()


def test_the_gate_is_a_mask_of_q_by_channel():
    q, k, v = spikes_of(8)
    found = Gate()(q, k, v)
    fired = LIF(0.5)((k * v).flatten(3).sum(-1))
    assert torch.equal(found, q * fired[..., None, None]) and bits(found) and 0 < found.mean() < q.mean()


def test_products_are_attention_without_a_softmax():
    q, k, v = spikes_of(8)
    heads = [x.unflatten(2, (2, 4)).flatten(-2).transpose(-2, -1) for x in (q, k, v)]  # tokens x width
    scores = heads[0] @ heads[1].transpose(-2, -1)
    wanted = LIF(0.5)((scores @ heads[2] * 0.125).transpose(-2, -1).reshape(q.shape))
    assert torch.equal(Products(2, 0.125)(q, k, v), wanted) and 0 < wanted.mean() < 1


def test_how_wide_a_head_is_the_tensors_say():
    q, k, v = spikes_of(8)
    narrow = Products(2, 0.125)(q[:, :, [0, 2, 4, 6]], k[:, :, [0, 2, 4, 6]], v)
    silent = torch.zeros(8)
    silent[[0, 2, 4, 6]] = 1
    assert torch.equal(narrow, Products(2, 0.125)(q * silent.view(8, 1, 1), k, v))


def test_a_repconv_folds_into_one_convolution():
    layer = RepConv(4).double()
    for norm in (layer.norm, layer.last):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    layer.eval()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        nothing = layer(torch.zeros_like(x))
        assert torch.allclose(nothing, nothing[:, :, :1, :1].expand_as(nothing))  # the border is no place
        impulses = torch.eye(4, dtype=torch.float64).view(4, 4, 1, 1)
        answers = layer(F.pad(impulses, [2] * 4))[:, :, 1:4, 1:4] - nothing[0, :, :1, :1]
        kernel = answers.transpose(0, 1).flip(-1, -2)
        torch.testing.assert_close(layer(x), F.conv2d(x, kernel, nothing[0, :, 0, 0], padding=1))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 3, 4, 4), (4, 4), (1, 0, 2, 4, 4)])
def test_images_of_other_shapes_are_refused(shape):
    with pytest.raises(StropError, match=r"images are \[B, 2, H, W\] or \[B, T, 2, H, W\]"):
        spiking("sdt")(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"widths": 16}, "widths is a list"),
        ({"widths": (True,)}, "widths counts from 1"),
        ({"depths": ()}, "depths is a list"),
        ({"depths": (MOST["depths"] + 1,)}, "depths counts from 1 to 256"),
        ({"heads": 0}, "heads counts"),
        ({"steps": 1.5}, "steps counts"),
        ({"attention": "softmax"}, "attention is gate or linear"),
        ({"residual": None}, "residual is membrane or spike"),
        ({"scale": float("nan")}, "scale is a finite number"),
        ({"pools": "012"}, "pools has a 0 or 1"),
        ({"pools": ""}, "pools has a 0 or 1"),
        ({"widths": (18,)}, "halves the width 18 down to a part of 4"),
        ({"widths": (16, 32)}, "one width goes with one depth"),
        ({"widths": (8, 16, 24, 32), "depths": (1,) * 5}, "linear attention and a membrane residual"),
        ({"attention": "linear", "heads": 3}, "3 heads cannot share"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changed, said):
    with pytest.raises(StropError, match=said):
        replace(CONFIGS["sdt"], **changed)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_brings_the_same_model_back(name, tmp_path):
    model = spiking(name)
    save(model, tmp_path / "model")
    again = from_folder(tmp_path / "model")
    assert again.config == model.config and not again.training
    with torch.no_grad():
        assert torch.equal(again(**again.example()), model(**model.example()))
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}


def test_another_module_can_take_the_built_ones_place(tmp_path):
    model = spiking("sdt")
    fc1, fc2 = model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc2
    with torch.no_grad():
        for owner in (fc1.conv, fc1.norm):
            owner.weight, owner.bias = (nn.Parameter(x[:5].clone()) for x in (owner.weight, owner.bias))
        fc1.norm.running_mean, fc1.norm.running_var = fc1.norm.running_mean[:5], fc1.norm.running_var[:5]
        fc2.conv.weight = nn.Parameter(fc2.conv.weight[:, :5].clone())
        wanted = model(**model.example())
    save(model, tmp_path)
    with pytest.raises(StropError, match=r"blocks.0.mlp.fc1.*\[5.*by the config"):
        from_folder(tmp_path)
    skeleton = build(read_config(tmp_path)).eval()
    skeleton.blocks[0].mlp = model.blocks[0].mlp
    load_weights(skeleton, tmp_path)
    with torch.no_grad():
        assert torch.equal(skeleton(**model.example()), wanted)


@pytest.fixture
def folder(tmp_path):
    save(spiking("sdt"), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"architecture": "Qwen3ForCausalLM"}, "architecture is 'Qwen3ForCausalLM', not SpikingTransformer"),
        ({"width": 3}, "no field is called 'width'; did you mean 'widths'"),
        ({"widths": None}, "widths is a list"),
        ({"widths": [1 << 14], "depths": [2]}, "the config describes .* numbers, more than"),
    ],
)
def test_configs_of_other_things_are_refused(folder, changed, said):
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | changed))
    with pytest.raises(StropError, match=said):
        from_folder(folder)


def test_damaged_configs_are_refused(folder):
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({n: told[n] for n in told if n != "depths"}))
    with pytest.raises(StropError, match="the field depths is missing"):
        from_folder(folder)
    for text in ("[]", "{", "[" * 100_000):
        (folder / "config.json").write_text(text)
        with pytest.raises(StropError, match=r"not SpikingTransformer|no readable config.json"):
            from_folder(folder)
    with pytest.raises(StropError, match=r"no readable config.json"):
        from_folder(folder / "gone")


def nan(tensors):
    tensors["head.bias"][0] = float("nan")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (nan, "head.bias holds what is no finite number"),
        (lambda tensors: tensors.update({"head.bias": torch.ones(5, dtype=torch.int64)}), "no finite number"),
        (lambda tensors: tensors.pop("head.bias"), "lacks 1 tensors, first 'head.bias'"),
        (
            lambda tensors: tensors.update(more=torch.ones(1)),
            "holds, beyond its config, 1 tensors, first 'more'",
        ),
        (
            lambda tensors: tensors.update({"head.bias": torch.ones(6)}),
            r"head.bias is \[6\], \[5\] by the config",
        ),
    ],
)
def test_weights_that_are_not_the_models_are_refused(folder, change, said):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(StropError, match=said):
        from_folder(folder)


def test_truncated_missing_and_pickled_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(StropError, match="truncated or not a safetensors file"):
        from_folder(folder)
    weights.unlink()
    with pytest.raises(StropError, match=r"model.safetensors is missing"):
        from_folder(folder)
    (folder / "model.pth").write_bytes(b"\x80\x04")
    for read in (lambda: from_folder(folder), lambda: convert_sdt_v2(folder / "model.pth")):
        with pytest.raises(StropError, match=r"model.pth is pickled, which can run code"):
            read()
