"""Looking inside a model of others: hooks that always detach, its layers, copies that share its weights."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from strop.core.errors import StropError


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """While open, the list holds the newest output of each module."""
    newest: list[Tensor] = [None] * len(modules)  # type: ignore[list-item]

    def keep(index: int, output: Tensor | tuple) -> None:
        newest[index] = output[0] if isinstance(output, tuple) else output

    handles = [
        module.register_forward_hook(lambda _module, _given, output, i=index: keep(i, output))
        for index, module in enumerate(modules)
    ]
    try:
        yield newest
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's transformer blocks, in order.

    Raises StropError when the model has no single list of them.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise StropError(
            f"{type(model).__name__} has no list of {count} decoder layers: leave its weights as they are, "
            "and draft with ngram or a small language model"
        )
    return found[0]


def shared(model: PreTrainedModel) -> PreTrainedModel:
    """The model's modules once more, around the same tensors: some can be swapped, none is held twice."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
