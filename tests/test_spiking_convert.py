"""Released SDT-v2 weights: a state dict under the released names, run by those names and as converted."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from strop.core.errors import StropError
from strop.models.spiking import LIF
from strop.models.spiking_convert import convert_sdt_v2

WIDTHS = (4, 8, 16, 16, 24)
"""Of the five stages; 8 heads share the last two."""
CLASSES, RATIO = 6, 2


class Released:
    """A state dict as the release names it, drawn as it is asked for, and what its modules compute."""

    def __init__(self):
        self.tensors, self.draw = {}, torch.Generator().manual_seed(0)

    def tensor(self, name, *shape, low=-1.0, high=1.0):
        if name not in self.tensors:
            drawn = torch.rand(shape, generator=self.draw, dtype=torch.float64)
            self.tensors[name] = low + (high - low) * drawn
        return self.tensors[name]

    def conv(self, x, name, out, kernel=1, bias=False, groups=1, stride=1, padding=None):
        one = name.endswith(("fc1_conv", "fc2_conv"))
        scale = 2 / (x.shape[1] // groups * kernel**2) ** 0.5
        shape = (out, x.shape[1] // groups, *([1] if one else [kernel, kernel]))
        weight = self.tensor(f"{name}.weight", *shape, low=-scale, high=scale).view(
            *shape[:2], kernel, kernel
        )
        shift = self.tensor(f"{name}.bias", out) if bias else None
        return F.conv2d(x, weight, shift, stride, kernel // 2 if padding is None else padding, groups=groups)

    def norm(self, x, name):
        width = x.shape[1]
        mean, var = (
            self.tensor(f"{name}.running_mean", width),
            self.tensor(f"{name}.running_var", width, low=0.3),
        )
        self.tensors[f"{name}.num_batches_tracked"] = torch.tensor(7)
        scale, shift = (
            self.tensor(f"{name}.weight", width, low=0.5),
            self.tensor(f"{name}.bias", width, low=0.0, high=1.5),
        )
        return F.batch_norm(x, mean, var, scale, shift)

    def repconv(self, x, name):
        width = x.shape[1]
        inside = self.norm(self.conv(x, f"{name}.0.body.0", width), f"{name}.0.body.1.bn")
        nothing = self.norm(torch.zeros_like(x[:1, :, :1, :1]), f"{name}.0.body.1.bn")
        padded = F.pad(inside - nothing, [1] * 4) + nothing
        x = self.conv(padded, f"{name}.0.body.2.0", width, 3, groups=width, padding=0)
        x = self.norm(self.conv(x, f"{name}.0.body.2.1", width), f"{name}.0.body.2.2")
        return self.norm(x, f"{name}.1")

    def conv_block(self, x, at):
        width = x.shape[2]
        s = fired(x)
        s = fired(
            over(s, lambda y: self.norm(self.conv(y, f"{at}.Conv.pwconv1", 2 * width), f"{at}.Conv.bn1"))
        )
        s = over(s, lambda y: self.conv(y, f"{at}.Conv.dwconv", 2 * width, 7, groups=2 * width))
        x = x + over(s, lambda y: self.norm(self.conv(y, f"{at}.Conv.pwconv2", width), f"{at}.Conv.bn2"))
        s = fired(
            over(fired(x), lambda y: self.norm(self.conv(y, f"{at}.conv1", RATIO * width, 3), f"{at}.bn1"))
        )
        return x + over(s, lambda y: self.norm(self.conv(y, f"{at}.conv2", width, 3), f"{at}.bn2"))

    def block(self, x, at):
        width, s = x.shape[2], fired(x)
        q, k, v = (fired(over(s, lambda y, n=n: self.repconv(y, f"{at}.attn.{n}_conv"))) for n in "qkv")
        heads = [y.flatten(3).view(*y.shape[:2], 8, width // 8, -1) for y in (q, k, v)]
        scores = torch.einsum("tbhcn,tbhcm->tbhnm", heads[0], heads[1])
        mixed = 0.125 * torch.einsum("tbhnm,tbhcm->tbhcn", scores, heads[2])
        a = LIF(0.5)(mixed.reshape(x.shape))
        assert 0.02 < a.mean() < 0.98  # or q, k and v would not matter
        x = x + over(a, lambda y: self.repconv(y, f"{at}.attn.proj_conv"))
        s = fired(over(fired(x), lambda y: self.dense(y, f"{at}.mlp.fc1", RATIO * width)))
        return x + over(s, lambda y: self.dense(y, f"{at}.mlp.fc2", width))

    def dense(self, x, at, out):
        return self.norm(self.conv(x, f"{at}_conv", out, bias=True), f"{at}_bn")

    def down(self, x, at, width, kernel=3, stride=2):
        return over(
            x,
            lambda y: self.norm(
                self.conv(y, f"{at}.encode_conv", width, kernel, bias=True, stride=stride), f"{at}.encode_bn"
            ),
        )

    def __call__(self, images):
        x = self.down(images.transpose(0, 1), "downsample1_1", WIDTHS[0], 7)
        x = self.conv_block(x, "ConvBlock1_1.0")
        x = self.conv_block(self.down(fired(x), "downsample1_2", WIDTHS[1]), "ConvBlock1_2.0")
        x = self.conv_block(self.down(fired(x), "downsample2", WIDTHS[2]), "ConvBlock2_1.0")
        x = self.down(fired(self.conv_block(x, "ConvBlock2_2.0")), "downsample3", WIDTHS[3])
        for i in range(2):
            x = self.block(x, f"block3.{i}")
        x = self.block(self.down(fired(x), "downsample4", WIDTHS[4], stride=1), "block4.0")
        weight = self.tensor("head.weight", CLASSES, WIDTHS[4])
        return (fired(x.mean((-2, -1))) @ weight.T + self.tensor("head.bias", CLASSES)).mean(0)


def fired(x):
    return LIF()(x)


def over(x, function):
    """A function of images, at every step."""
    return torch.stack([function(step) for step in x])


@pytest.fixture(scope="module")
def released():
    model = Released()
    images = torch.randn(2, 4, 3, 64, 80, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = model(images)
    model.tensors["head_kd.weight"] = torch.ones(CLASSES, WIDTHS[4], dtype=torch.float64)
    return model, images, logits


def test_a_converted_model_answers_as_the_released_names_say(released, tmp_path):
    model, images, logits = released
    save_file(model.tensors, tmp_path / "released.safetensors")
    found = convert_sdt_v2(tmp_path / "released.safetensors")
    assert found.config.widths == WIDTHS[1:] and found.config.depths == (1, 1, 2, 2, 1)
    assert (found.config.classes, found.config.mlp_ratio, found.config.channels) == (CLASSES, RATIO, 3)
    with torch.no_grad():
        again = found.double()(images)
    exact = {n: t for n, t in found.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert sum(t.numel() for t in exact.values()) == sum(
        t.numel()
        for n, t in model.tensors.items()
        if not n.endswith("num_batches_tracked") and "head_kd" not in n
    )
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-4)
    assert logits.std() > 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors: tensors.pop("downsample2.encode_conv.weight"),
            "has no 'downsample2.encode_conv.weight'",
        ),
        (lambda tensors: tensors.pop("block3.1.attn.q_conv.1.bias"), "lacks 1 tensors"),
        (
            lambda tensors: tensors.update(patch_embed=torch.ones(1)),
            "holds 'patch_embed', which is no tensor",
        ),
        (lambda tensors: tensors.update({"head.bias": torch.ones(2)}), "by the config"),
        (lambda tensors: tensors.update({"head.weight": torch.tensor(1.0)}), "as SDT-v2's classifier has it"),
    ],
)
def test_other_state_dicts_are_refused(released, tmp_path, change, said):
    tensors = dict(released[0].tensors)
    change(tensors)
    save_file(tensors, tmp_path / "released.safetensors")
    with pytest.raises(StropError, match=said):
        convert_sdt_v2(tmp_path / "released.safetensors")
