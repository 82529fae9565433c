"""Documents and questions on them packed into rows, and the masks under which a model reads them.

A row holds documents one after another at their true positions, and behind them any number of questions. All
questions start at the position where the documents end and none sees another, so that each is what it would
be alone, and one pass over the documents serves them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strop.core.errors import StropError

IGNORED = -100
"""Label of a slot that bears no loss."""

Tokens = Sequence[int]
Sees = Callable[[Tensor], Tensor]
"""From the parts of rows `[B, T]` to which slot sees which, `[B, 1, T, T]` bool."""


@dataclass(frozen=True)
class Asked:
    """Documents with questions on them, in tokens."""

    documents: Sequence[Tokens]
    questions: Sequence[tuple[Tokens, Tokens]]
    """Queries and the answers that should follow, each answer with the token that ends it."""

    def __post_init__(self) -> None:
        texts = [*self.documents, *(tokens for question in self.questions for tokens in question)]
        if not self.documents or not self.questions or not all(map(len, texts)):
            raise StropError(
                "training takes one or more documents, each with questions, and no text without a token: "
                "leave empty ones out"
            )


@dataclass(frozen=True)
class Packed:
    """B rows of T slots, padded at their ends."""

    ids: Tensor
    """Tokens, `[B, T]`."""
    positions: Tensor
    """True positions, `[B, T]`."""
    parts: Tensor
    """What each slot belongs to, `[B, T]`: documents are 0, 1, ..., questions and then padding -1, -2, ..."""
    labels: Tensor
    """The token that should come next, `[B, T]`: IGNORED but where an answer is written."""

    def to(self, device: torch.device) -> "Packed":
        """The same on a device."""
        tensors = (self.ids, self.positions, self.parts, self.labels)
        return Packed(*(tensor.to(device) for tensor in tensors))

    def inputs(self, sees: Sees) -> dict[str, Any]:
        """What the forward pass of a transformers model takes: ids, positions and the mask."""
        return {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": sees(self.parts)}


def tokenized(
    tokenizer: Any, documents: Sequence[str], queries: Sequence[str], answers: Sequence[str]
) -> Asked:
    """Each text in tokens by itself, none with special tokens, each answer ended by the end-of-text token."""
    end = tokenizer.eos_token_id
    if end is None:
        raise StropError("the tokenizer has no end-of-text token to end answers with: set its eos_token")

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    return Asked(ids(documents), [(q, [*a, end]) for q, a in zip(ids(queries), ids(answers), strict=True)])


def pack(rows: Sequence[Asked], pad: int = 0) -> Packed:
    """Rows side by side, each filled up to the longest with the token `pad`."""
    slots = [_slots(row) for row in rows]
    width = max(len(row) for row in slots)
    padded = [
        row + [(pad, 0, -1 - len(asked.questions), IGNORED)] * (width - len(row))
        for row, asked in zip(slots, rows, strict=True)
    ]
    return Packed(*torch.tensor(padded).unbind(-1))


def _slots(row: Asked) -> list[tuple[int, int, int, int]]:
    """(id, position, part, label) of each slot."""
    slots: list[tuple[int, int, int, int]] = []
    for part, document in enumerate(row.documents):
        slots += [(token, len(slots) + i, part, IGNORED) for i, token in enumerate(document)]
    end = len(slots)
    for number, (query, answer) in enumerate(row.questions):
        tokens = [*query, *answer]
        labels = [IGNORED] * (len(query) - 1) + list(answer)
        slots += [
            (token, end + i, -1 - number, label)
            for i, (token, label) in enumerate(zip(tokens[:-1], labels, strict=True))
        ]
    return slots


def alone(parts: Tensor) -> Tensor:
    """The block-diagonal mask: a document sees itself, a question sees all documents and itself.

    What a document's tokens become then depends on its own text alone, and on its place only through the
    rotation of its keys. Keys rotated from position 0 and shifted later are the same keys, so training may
    give documents their true positions, and reuse at any other place is exact.
    """
    query, key = parts[:, :, None], parts[:, None, :]
    return _causal((query == key) | ((query < 0) & (key >= 0)))


def in_sequence(parts: Tensor) -> Tensor:
    """The ordinary causal mask: a document sees those before it too."""
    query, key = parts[:, :, None], parts[:, None, :]
    return _causal((query == key) | (key >= 0))


def _causal(seen: Tensor) -> Tensor:
    return seen.tril()[:, None]
