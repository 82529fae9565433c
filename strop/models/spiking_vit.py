"""Spiking vision transformers: SDT (arXiv 2307.01694), Spikformer (2209.15425), SDT-v2 (2404.03663).

Convolutions read spikes: convolution, batch norm, neuron, over T steps that share weights, and no softmax.
Batch norms pool over steps and images alike. Tensors are `[T, B, C, H, W]`.

Left out: modules that the releases hold but never run, drop path, the max-pools inside attention that SDT
adds for cameras of events, distillation heads. Pointwise convolutions are 2-D throughout.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from strop.core.errors import StropError
from strop.models.spiking import LIF
from strop.models.spiking_config import SpikingConfig

GATE = 0.5
"""Threshold of the neurons inside attention."""


class SpikingTransformer(nn.Module):
    """A classifier of images or event frames.

    `blocks` holds what repeats; `stem` comes before, and `downs` before the blocks of those numbers.
    """

    def __init__(self, config: SpikingConfig) -> None:
        super().__init__()
        self.config = config
        if config.pyramid:
            self.stem, self.blocks, self.downs = _pyramid(config)
        else:
            width, depth = config.widths[0], config.depths[0]
            self.stem = Stem(config)
            self.blocks = nn.ModuleList(transformer_block(config, width) for _ in range(depth))
            self.downs = nn.ModuleDict()
        self.spike = _membrane_only(config)
        self.head = nn.Linear(config.widths[-1], config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]`, the mean over the steps.

        `images` are `[B, C, H, W]`, shown at every step, or `[B, T, C, H, W]`. Raises StropError for others.
        """
        return self.logits(images).mean(0)

    def logits(self, images: Tensor) -> Tensor:
        """Logits `[T, B, classes]` of every step."""
        x = self.stem(self._frames(images))
        for number, block in enumerate(self.blocks):
            if str(number) in self.downs:
                x = self.downs[str(number)](x)
            x = block(x)
        return self.head(self.spike(x.mean((-2, -1))))

    def _frames(self, images: Tensor) -> Tensor:
        """Time first, `[T, B, C, H, W]`."""
        channels = self.config.channels
        if images.dim() not in (4, 5) or images.shape[-3] != channels or 0 in images.shape[1:]:
            raise StropError(
                f"images are [B, {channels}, H, W] or [B, T, {channels}, H, W], got {list(images.shape)}"
            )
        if images.dim() == 5:
            return images.transpose(0, 1)
        return images.unsqueeze(0).expand(self.config.steps, -1, -1, -1, -1)

    def example(self) -> dict[str, Tensor]:
        """Keyword inputs of a small forward, the same at every call: two inputs that end as 2 x 2 tokens."""
        config, weight = self.config, self.head.weight
        size = 32 if config.pyramid else 2 << config.pools.count("1")
        draw = torch.Generator().manual_seed(0)
        drawn = torch.randn(2, config.steps, config.channels, size, size, generator=draw)
        return {"images": drawn.to(weight.device, weight.dtype)}


class ConvNorm(nn.Module):
    """A convolution and its batch norm, with steps and images as one batch."""

    def __init__(self, conv: nn.Module, width: int) -> None:
        super().__init__()
        self.conv, self.norm = conv, nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])


class Pool(nn.Module):
    """The largest of 3 x 3, at every second place."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x.flatten(0, 1), 3, 2, 1).unflatten(0, x.shape[:2])


class Stem(nn.Module):
    """Convolutions up to the blocks' width, then one more beside the stream, which tells places apart."""

    def __init__(self, config: SpikingConfig) -> None:
        super().__init__()
        width, stages = config.widths[0], len(config.pools)
        widths = [config.channels, *(width >> (stages - 1 - i) for i in range(stages))]
        self.stages = nn.Sequential()
        for i, (before, after) in enumerate(pairwise(widths)):
            fires = i + 1 < stages or config.residual == "spike"
            stage = OrderedDict(convolve=_conv(before, after, 3), spike=LIF() if fires else nn.Identity())
            if config.pools[i] == "1":
                stage["pool"] = Pool()
            self.stages.append(nn.Sequential(stage))
        self.position = nn.Sequential(
            OrderedDict(
                enter=_membrane_only(config), convolve=_conv(width, width, 3), leave=_spike_only(config)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(x)
        return x + self.position(x)


class Block(nn.Module):
    """Branches beside the residual stream, one after another."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.children():
            x = x + branch(x)
        return x


class Attention(nn.Module):
    """Spikes of queries, keys and values, mixed and projected."""

    def __init__(self, config: SpikingConfig, width: int) -> None:
        super().__init__()
        self.enter = _membrane_only(config)
        self.q, self.k, self.v = (
            nn.Sequential(OrderedDict(project=_projection(config, width), spike=LIF())) for _ in range(3)
        )
        self.mix = Gate() if config.attention == "gate" else Products(config.heads, config.scale)
        self.projection = _projection(config, width, bias=True)
        self.leave = _spike_only(config)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.enter(x)
        return self.leave(self.projection(self.mix(self.q(spikes), self.k(spikes), self.v(spikes))))


class Gate(nn.Module):
    """q where a channel's k and v have met often enough in the image: masks instead of products."""

    def __init__(self) -> None:
        super().__init__()
        self.spike = LIF(GATE)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q * self.spike((k * v).sum((-2, -1), keepdim=True))


class Products(nn.Module):
    """Spikes of q (k^T v) scale, in every head; how wide a head is, the tensors say."""

    def __init__(self, heads: int, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.spike = LIF(GATE)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = q.shape[-2:]
        q, k, v = (x.unflatten(2, (self.heads, -1)).flatten(-2) for x in (q, k, v))
        mixed = (v @ k.transpose(-2, -1)) @ q * self.scale
        return self.spike(mixed.flatten(2, 3).unflatten(-1, places))


class RepConv(nn.Module):
    """1 x 1, batch norm, depthwise 3 x 3, 1 x 1: linear, so that it folds into one 3 x 3 convolution.

    For that the depthwise convolution must see, outside the image, what the norm makes of nothing.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width, bias=False)
        self.second = nn.Conv2d(width, width, 1, bias=False)
        self.last = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm(self.first(x))
        border = F.pad(inside.new_zeros(1, 1, *inside.shape[-2:]), [1] * 4, value=1.0)
        padded = F.pad(inside, [1] * 4) + border * self._of_nothing().to(inside.dtype)
        return self.last(self.second(self.depthwise(padded)))

    def _of_nothing(self) -> Tensor:
        """`[1, C, 1, 1]`: what the norm answers to 0, by its running statistics and without a gradient."""
        norm = self.norm
        rate = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        return (norm.bias.detach() - norm.running_mean * rate).view(1, -1, 1, 1)


def transformer_block(config: SpikingConfig, width: int) -> Block:
    """Attention, then two pointwise convolutions."""
    mlp = _two_layers(config, width, 1, bias=True)
    return Block(attention=Attention(config, width), mlp=mlp)


def conv_block(config: SpikingConfig, width: int) -> Block:
    """A separable convolution over 7 x 7 places, then two of 3 x 3 (SDT-v2)."""
    middle = 2 * width
    around = nn.Conv2d(middle, middle, 7, padding=3, groups=middle, bias=False)
    back = nn.Conv2d(middle, width, 1, bias=False)
    separable = OrderedDict(
        enter=LIF(),
        expand=_conv(width, middle, 1),
        spike=LIF(),
        contract=ConvNorm(nn.Sequential(OrderedDict(depthwise=around, pointwise=back)), width),
    )
    return Block(separable=nn.Sequential(separable), channel=_two_layers(config, width, 3, bias=False))


def _two_layers(config: SpikingConfig, width: int, kernel: int, bias: bool) -> nn.Sequential:
    hidden = config.mlp_ratio * width
    return nn.Sequential(
        OrderedDict(
            enter=_membrane_only(config),
            fc1=_conv(width, hidden, kernel, bias=bias),
            spike=LIF(),
            fc2=_conv(hidden, width, kernel, bias=bias),
            leave=_spike_only(config),
        )
    )


def _pyramid(config: SpikingConfig) -> tuple[nn.Module, nn.ModuleList, nn.ModuleDict]:
    """The stem, all blocks in order, and the down-samplings by the number of the block that each precedes."""
    widths = (config.channels, config.widths[0] // 2, *config.widths)
    makers: list[Callable[[SpikingConfig, int], Block]] = [conv_block] * 3 + [transformer_block] * 2
    stem = _conv(config.channels, widths[1], 7, stride=2, bias=True)
    blocks, downs = nn.ModuleList(), nn.ModuleDict()
    for stage, (make, depth) in enumerate(zip(makers, config.depths, strict=True)):
        if stage:
            stride = 1 if stage == len(makers) - 1 else 2
            down = _conv(widths[stage], widths[stage + 1], 3, stride=stride, bias=True)
            downs[str(len(blocks))] = nn.Sequential(OrderedDict(enter=LIF(), convolve=down))
        blocks.extend(make(config, widths[stage + 1]) for _ in range(depth))
    return stem, blocks, downs


def _projection(config: SpikingConfig, width: int, bias: bool = False) -> ConvNorm:
    return ConvNorm(RepConv(width), width) if config.pyramid else _conv(width, width, 1, bias=bias)


def _conv(before: int, after: int, kernel: int, stride: int = 1, bias: bool = False) -> ConvNorm:
    return ConvNorm(nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=bias), after)


def _membrane_only(config: SpikingConfig) -> nn.Module:
    """Branches off a stream of currents begin with a neuron."""
    return LIF() if config.residual == "membrane" else nn.Identity()


def _spike_only(config: SpikingConfig) -> nn.Module:
    """Branches that add to a stream of spikes end with one."""
    return LIF() if config.residual == "spike" else nn.Identity()
