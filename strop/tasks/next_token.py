"""Next tokens of real text: how often a language model's likeliest token is the one that comes.

Unlike perplexity it is an accuracy, so that a tolerance means the same as for a classifier.
"""

from typing import Any

import torch
from torch import Tensor, nn

BATCH = 8
"""Rows that are read together."""


@torch.no_grad()
def right(model: nn.Module, rows: Tensor) -> Tensor:
    """Which next tokens of `rows` `[N, L]` a causal language model gets right, `[N, L - 1]`."""
    place = next(model.parameters()).device
    found = []
    for batch in rows.split(BATCH):
        logits = predicted(model, batch.to(place))
        found.append(logits.argmax(-1).cpu() == batch[:, 1:])
    return torch.cat(found)


def accuracy(model: nn.Module, rows: Tensor) -> float:
    """The share of next tokens that are right, 0 to 1."""
    return right(model, rows).double().mean().item()


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Cross-entropy of the next tokens, in nats a token."""
    rows = rows.to(next(model.parameters()).device)
    logits = predicted(model, rows).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def predicted(model: nn.Module, rows: Tensor) -> Tensor:
    """Logits `[N, L - 1, V]` of the tokens that follow each but the last."""
    given: Any = model(input_ids=rows, use_cache=False)
    return given.logits[:, :-1]
