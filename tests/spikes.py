"""Tiny spiking transformers of every kind, seeded, with batch norms that have seen something."""

import torch
from torch import nn

from strop.models.spiking_config import SpikingConfig
from strop.models.spiking_vit import SpikingTransformer

SMALL = {"channels": 2, "classes": 5, "heads": 2, "scale": 1.0, "steps": 3}
CONFIGS = {
    "sdt": SpikingConfig.sdt(2, 16, pools="010", **SMALL),
    "linear": SpikingConfig.sdt(1, 16, attention="linear", pools="01", **SMALL),
    "spikformer": SpikingConfig.spikformer(2, 16, pools="001", **SMALL),
    "sdt_v2": SpikingConfig.sdt_v2((8, 12, 16, 24), depths=(1, 1, 2, 2, 1), mlp_ratio=2, **SMALL),
}


def spiking(name: str, dtype: torch.dtype = torch.float32) -> SpikingTransformer:
    """One of `CONFIGS`, in eval mode: lively, as trained models are, and unlike in every channel."""
    torch.manual_seed(0)
    model = SpikingTransformer(CONFIGS[name])
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.8, 1.6, generator=draw)
            norm.bias.uniform_(0.2, 1.2, generator=draw)
            norm.momentum = 1.0
        model(torch.randn(16, *model.example()["images"].shape[1:], generator=draw))
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = 0.1
    return model.to(dtype).eval()
