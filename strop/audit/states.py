"""The residual stream behind a decoder layer, and the loss of each token, while a model reads text.

A recipe with a kv method is read under pseudo-decode: its cache damages what later blocks attend to, which a
single prefill would never feel.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from strop.audit.base import LanguageModel
from strop.audit.quality import pseudo_decode
from strop.core.errors import StropError
from strop.core.hooks import decoder_layers, outputs_of


def site(model: PreTrainedModel, layer: int) -> nn.Module:
    """The module whose output is the stream behind a layer; the embeddings for -1."""
    layers = decoder_layers(model)
    if layer >= len(layers):
        raise StropError(f"the model has layers 0 to {len(layers) - 1}, and layer {layer} was asked for")
    return model.get_input_embeddings() if layer < 0 else layers[layer]


@torch.no_grad()
def read(lm: LanguageModel, rows: Tensor, layer: int, lossy: bool = False) -> tuple[Tensor, Tensor]:
    """States `[B, T, d]` float32 behind a layer, and losses `[B, T - 1]` in nats, of token ids `[B, T]`.

    `lossy` reads through the recipe's cache.
    """
    rows = rows.to(lm.device)
    states, losses = [], []
    with outputs_of([site(lm.model, layer)]) as newest:
        start = 0
        for logits in _logits(lm, rows, lossy):
            states.append(newest[0].float())
            targets = rows[:, start + 1 : start + 1 + logits.shape[1]]
            losses.append(_losses(logits[:, : targets.shape[1]], targets))
            start += logits.shape[1]
    return torch.cat(states, 1), torch.cat(losses, 1)


def _logits(lm: LanguageModel, rows: Tensor, lossy: bool) -> Iterator[Tensor]:
    if lossy:
        yield from pseudo_decode(lm.model, rows, lm.new_cache())
    else:
        yield lm.model(rows, use_cache=False).logits


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """One sequence after another: in float32 the logits of all would be larger than all else."""
    pairs = zip(logits, targets, strict=True)
    return torch.stack([cross_entropy(ours.float(), wanted, reduction="none") for ours, wanted in pairs])


@contextmanager
def replaced(model: PreTrainedModel, layer: int, states: Sequence[Tensor]) -> Iterator[None]:
    """While open, what comes out behind a layer is `states`, one `[B, T, d]` after another."""
    waiting = iter(states)

    def swap(_module: nn.Module, _given: tuple, output: Tensor | tuple) -> Tensor | tuple:
        made = next(waiting)
        if isinstance(output, tuple):
            return (made.to(output[0].dtype), *output[1:])
        return made.to(output.dtype)

    handle = site(model, layer).register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()


def sequences(rows: Sequence[Sequence[int]], length: int, start: int | None = None) -> Tensor:
    """Token ids of documents, one after another, in rows `[S, length]`, each behind `start` where given.

    Raises StropError when there are fewer tokens than one row takes.
    """
    room = length - (start is not None)
    flat = [token for row in rows for token in row]
    count = len(flat) // room
    if not count:
        raise StropError(f"the data has {len(flat)} tokens, less than one sequence of {room}: give more text")
    body = torch.tensor(flat[: count * room]).view(count, room)
    return body if start is None else torch.cat([torch.full((count, 1), start), body], dim=1)
