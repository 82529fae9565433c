"""Released SDT-v2 checkpoints (github.com/BICLab/Spike-Driven-Transformer-V2) as folders of strop.

Names are translated, pointwise 1-D convolutions become 2-D, and the config is read off the shapes. What is
refused: pickles, which a user turns into safetensors where they are trusted. What is left behind: counts of
batches, and the second head of a distilled model.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from strop.core.errors import StropError, quoted, reason
from strop.models.spiking_config import SpikingConfig
from strop.models.spiking_saved import build, fill, read_tensors
from strop.models.spiking_vit import SpikingTransformer

STAGES = (("ConvBlock1_1",), ("ConvBlock1_2",), ("ConvBlock2_1", "ConvBlock2_2"), ("block3",), ("block4",))
"""Their lists of blocks, by stage of the pyramid."""
DOWNS = ("downsample1_1", "downsample1_2", "downsample2", "downsample3", "downsample4")
REPCONV = {
    "0.body.0": "conv.first",
    "0.body.1.bn": "conv.norm",
    "0.body.2.0": "conv.depthwise",
    "0.body.2.1": "conv.second",
    "0.body.2.2": "conv.last",
    "1": "norm",
}
PARTS = {
    "Conv.pwconv1": "separable.expand.conv",
    "Conv.bn1": "separable.expand.norm",
    "Conv.dwconv": "separable.contract.conv.depthwise",
    "Conv.pwconv2": "separable.contract.conv.pointwise",
    "Conv.bn2": "separable.contract.norm",
    "conv1": "channel.fc1.conv",
    "bn1": "channel.fc1.norm",
    "conv2": "channel.fc2.conv",
    "bn2": "channel.fc2.norm",
    "mlp.fc1_conv": "mlp.fc1.conv",
    "mlp.fc1_bn": "mlp.fc1.norm",
    "mlp.fc2_conv": "mlp.fc2.conv",
    "mlp.fc2_bn": "mlp.fc2.norm",
    **{f"attn.{n}_conv.{a}": f"attention.{n}.project.{b}" for n in "qkv" for a, b in REPCONV.items()},
    **{f"attn.proj_conv.{a}": f"attention.projection.{b}" for a, b in REPCONV.items()},
}
"""Modules of their blocks, and ours."""
LEFT = re.compile(r"head_kd\..*|.*\.num_batches_tracked")


def convert_sdt_v2(file: Path) -> SpikingTransformer:
    """The model of a released state dict in a safetensors file.

    Raises StropError for pickles, and where tensors are missing, unknown, of odd shapes, or not finite.
    """
    released = {n: t for n, t in read_tensors(file).items() if not LEFT.fullmatch(n)}
    config = _config(released, file)
    names = _names(config)
    unknown = sorted(name for name in released if name.rpartition(".")[0] not in names)
    if unknown:
        raise StropError(
            f"{file} holds {quoted(unknown[0])}, which is no tensor of SDT-v2's classifier: name another file"
        )
    model = build(config)
    ours = {}
    for name, tensor in released.items():
        module, _, leaf = name.rpartition(".")
        flat = tensor.dim() == 3
        ours[f"{names[module]}.{leaf}"] = tensor.unsqueeze(-1) if flat else tensor
    fill(model, ours, file)
    return model.eval()


def _config(released: Mapping[str, Tensor], file: Path) -> SpikingConfig:
    """The shape that tensors tell; what they do not is the same in all released models."""
    try:
        widths = [len(released[f"{down}.encode_conv.weight"]) for down in DOWNS]
        channels, classes = released[f"{DOWNS[0]}.encode_conv.weight"].shape[1], len(released["head.weight"])
        ratio = len(released["block3.0.mlp.fc1_conv.weight"]) // widths[3]
    except (LookupError, TypeError, ZeroDivisionError) as error:
        raise StropError(
            f"{file} has no {reason(error)} as SDT-v2's classifier has it: give a released state dict"
        ) from error
    depths = [sum(_depth(released, name) for name in names) for names in STAGES]
    return SpikingConfig.sdt_v2(
        tuple(widths[1:]), depths=tuple(depths), mlp_ratio=ratio, channels=channels, classes=classes
    )


def _depth(released: Mapping[str, Tensor], blocks: str) -> int:
    return len({name.split(".")[1] for name in released if name.startswith(f"{blocks}.")})


def _names(config: SpikingConfig) -> dict[str, str]:
    """Their names of modules with weights, and ours."""
    names, number = {"head": "head"}, 0
    for stage, (down, blocks) in enumerate(zip(DOWNS, STAGES, strict=True)):
        ours = f"downs.{number}.convolve" if stage else "stem"
        names |= {f"{down}.encode_conv": f"{ours}.conv", f"{down}.encode_bn": f"{ours}.norm"}
        each = config.depths[stage] // len(blocks)
        for block in (f"{name}.{i}" for name in blocks for i in range(each)):
            names |= {f"{block}.{theirs}": f"blocks.{number}.{mine}" for theirs, mine in PARTS.items()}
            number += 1
    return names
