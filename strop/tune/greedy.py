"""Greedy continuations of many prompts."""

from collections.abc import Sequence

from strop.model import Model

BATCH = 16
"""Prompts generated together when the recipe allows it."""


def in_batches(model: Model, rows: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[list[int]]:
    """Greedy continuations of prompts (token ids), as many at a time as the recipe allows."""
    size = 1 if model.recipe.decode is not None else BATCH
    out: list[list[int]] = []
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        longest = max(len(row) for row in rows[part])
        room = model.context_limit - longest
        new = model.generate_ids(rows[part], min(max(tokens[part]), room))
        out += [ids[:most] for ids, most in zip(new, tokens[part], strict=True)]
    return out
