"""The linear layers that a weights method changes, in a model that it has changed or not."""

from torch import nn
from transformers import PreTrainedModel

from strop.weights.base import targets
from strop.weights.experts import split_experts
from strop.weights.linear import PackedLinear


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Those of the decoder layers by name, packed or not; fused experts are split in place.

    Raises StropError if there is none.
    """
    split_experts(model)
    packed: dict[str, nn.Module] = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)
    }
    return packed or targets(model)
