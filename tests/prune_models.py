"""Tiny seeded models with everything that ties channels together: what tests of tracing and cutting share."""

from collections.abc import Callable, Iterable
from functools import cache

import torch
from conftest import CONFIGS, DENSE
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Phi3Config, ViTConfig, ViTForImageClassification

from strop.models.spiking_config import SpikingConfig
from strop.models.spiking_vit import SpikingTransformer
from strop.prune.trace import trace
from strop.prune.units import Unit, Units


class Reads(nn.Module):
    """A model that says what it reads."""

    shape = (2, 3, 10)

    def example(self) -> dict[str, Tensor]:
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(0))
        return {"x": x.to(next(self.parameters()).dtype)}


class Heads(Reads):
    """Attention whose width in heads the tensors say, fewer keys than queries, on a stream without a norm."""

    def __init__(self, queries: int = 4, keys: int = 2, width: int = 4) -> None:
        super().__init__()
        self.heads = queries, keys
        self.embed = nn.Linear(10, 8)
        self.q = nn.Linear(8, queries * width)
        self.k, self.v = nn.Linear(8, keys * width), nn.Linear(8, keys * width)
        self.out, self.head = nn.Linear(queries * width, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (
            layer(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for layer, heads in ((self.q, self.heads[0]), (self.k, self.heads[1]), (self.v, self.heads[1]))
        )
        k, v = (t.repeat_interleave(self.heads[0] // self.heads[1], 1) for t in (k, v))
        scores = (q @ k.transpose(-2, -1) * 0.3).softmax(-1)
        return self.head(x + self.out((scores @ v).transpose(1, 2).flatten(2)))


class Fused(Reads):
    """Queries, keys and values from one matrix, as [3, heads, width]; scores are scaled by a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(10), nn.Linear(10, 3 * 2 * 6), nn.Linear(2 * 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, scale=0.4)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Grouped(Reads):
    """Convolutions in groups, depthwise ones, two outputs a channel, transposed; flattened into a head."""

    shape = (2, 3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(24, 20, 1, groups=4)
        self.up = nn.ConvTranspose2d(20, 9, 2, stride=2)
        self.head = nn.Linear(9 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.enter(x)).relu())
        x = F.max_pool2d(self.up(self.grouped(x).relu()), 2)
        return self.head(x.flatten(1))


class Tied(Reads):
    """One matrix embeds and reads out, and one layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.head.weight = self.embed.weight
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.body(x).tanh()
        for _ in range(2):
            x = x + self.fc2(self.fc1(x).relu())
        return self.head(x)

    def example(self) -> dict[str, Tensor]:
        return {"x": torch.arange(6).view(2, 3)}


class Loop(Reads):
    """A neuron over time that starts as a number, on [T, B, C, H, W], beside a stream of membranes."""

    shape = (3, 2, 2, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.wide, self.back = nn.Conv2d(6, 16, 1), nn.Conv2d(16, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.shape[:2]
        x = self.norm(self.enter(x.flatten(0, 1))).unflatten(0, steps)
        hidden = self.spike(self.wide(self.spike(x).flatten(0, 1)).unflatten(0, steps))
        x = x + self.back(hidden.flatten(0, 1)).unflatten(0, steps)
        return self.head(self.spike(x.sum((-2, -1)))).mean(0)

    def spike(self, x: Tensor) -> Tensor:
        membrane, spikes = 0.0, []
        for current in x:
            membrane = membrane + (current - membrane) / 2
            spikes.append((membrane >= 0.2).to(x.dtype))
            membrane = membrane * (1 - spikes[-1])
        return torch.stack(spikes)


class Gated(Reads):
    """A gate and its input from one matrix, by chunks, with a scale for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.scale, self.out = nn.Linear(10, 24), nn.Parameter(torch.rand(12)), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value * self.scale)


def spiking(config: SpikingConfig) -> nn.Module:
    """One whose neurons fire to the last layer: norms with statistics of their own, and gains."""
    model = SpikingTransformer(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.1, 0.4)
            nn.init.uniform_(module.weight, 0.5, 3.0)
            nn.init.uniform_(module.bias, 0.5, 1.5)
    return model


def language(name: str) -> nn.Module:
    return AutoModelForCausalLM.from_config(CONFIGS[name])


def vision() -> nn.Module:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16}
    return ViTForImageClassification(
        ViTConfig(**sizes, num_hidden_layers=2, patch_size=8, initializer_range=0.3)
    )


SMALL = {"channels": 2, "classes": 10, "heads": 4}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "heads": Heads,
    "fused": Fused,
    "grouped": Grouped,
    "tied": Tied,
    "loop": Loop,
    "gated": Gated,
    "vit": vision,
    **{name: lambda name=name: language(name) for name in ("llama", "qwen3", "mistral", "gpt2")},
    "phi3": lambda: AutoModelForCausalLM.from_config(Phi3Config(**DENSE)),
    "sdt": lambda: spiking(SpikingConfig.sdt(2, 32, pools="0011", steps=3, **SMALL)),
    "spikformer": lambda: spiking(SpikingConfig.spikformer(1, 32, pools="0011", steps=3, **SMALL)),
    "sdt_v2": lambda: spiking(
        SpikingConfig.sdt_v2((8, 16, 24, 24), depths=(1, 1, 1, 1, 1), steps=2, **SMALL)
    ),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The seeded model of that name, in evaluation mode."""
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).eval()


@cache
def traced(name: str) -> tuple[nn.Module, Units]:
    """A model that tests must leave as it is, and its units."""
    model = made(name)
    return model, trace(model)


def distinct(units: Units) -> list[Unit]:
    """Of units that are built alike, in several layers, the last."""
    return list(
        {tuple((a.tensor.rpartition(".")[2], a.role) for a in u.axes): u for u in units.units}.values()
    )


def half(units: Iterable, share: float = 0.5) -> dict[str, Tensor]:
    """A share of the channels of each unit, drawn with a seed, in every head others."""
    drawn = torch.Generator().manual_seed(1)
    kept = {}
    for unit in units:
        each = unit.width // unit.heads
        stays = torch.rand(unit.heads, each, generator=drawn).argsort(1)[:, : max(1, int(each * share))]
        kept[unit.name] = (stays.sort(1).values + each * torch.arange(unit.heads)[:, None]).flatten()
    return kept
