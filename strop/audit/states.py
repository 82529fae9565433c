"""The residual stream behind a decoder layer, and the loss of each token, while a model reads text.

A recipe with a kv method is read under pseudo-decode: its cache damages what later blocks attend to, which a
single prefill would never feel.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from strop.audit.base import LanguageModel
from strop.audit.quality import pseudo_decode
from strop.core.errors import StropError
from strop.core.hooks import decoder_layers

Change = Callable[[Tensor], Tensor]


def require_layer(model: PreTrainedModel, layer: int) -> nn.ModuleList:
    """The decoder layers. Raises StropError where the one asked for is not among them."""
    layers = decoder_layers(model)
    if layer >= len(layers):
        raise StropError(f"the model has layers 0 to {len(layers) - 1}, and layer {layer} was asked for")
    return layers


@contextmanager
def stream(model: PreTrainedModel, layer: int, change: Change) -> Iterator[None]:
    """While open, `change` hears what comes out behind a layer and says what goes on; -1 is what enters the
    first layer, which is more than the embeddings where positions are added or scales applied.
    """
    layers = require_layer(model, layer)

    def behind(_module: nn.Module, _given: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def before(_module: nn.Module, given: tuple, named: dict) -> tuple[tuple, dict]:
        if given:
            return (change(given[0]), *given[1:]), named
        return given, named | {"hidden_states": change(named["hidden_states"])}

    if layer < 0:
        handle = layers[0].register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = layers[layer].register_forward_hook(behind)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def read(lm: LanguageModel, rows: Tensor, layer: int, lossy: bool = False) -> tuple[Tensor, Tensor]:
    """States `[B, T, d]` float32 behind a layer, and losses `[B, T - 1]` in nats, of token ids `[B, T]`.

    `lossy` reads through the recipe's cache.
    """
    rows = rows.to(lm.device)
    states, losses = list[Tensor](), []

    def keep(found: Tensor) -> Tensor:
        states.append(found.float())
        return found

    with stream(lm.model, layer, keep):
        start = 0
        for logits in _logits(lm, rows, lossy):
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
    with stream(model, layer, lambda found: next(waiting).to(found.dtype)):
        yield


def batches(rows: Tensor, tokens: int) -> tuple[Tensor, ...]:
    """Token ids `[S, T]` as whole sequences of at most `tokens` tokens at a time, but at least one."""
    return rows.split(max(tokens // rows.shape[1], 1))


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
