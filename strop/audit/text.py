"""Text as an audit reads it: pieces in a drawn order, as token ids, and the token that begins a sequence."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from strop.core.errors import StropError
from strop.tasks.data import Data

PIECE = 1 << 14
"""Characters above which a document is cut into pieces."""


def pieces(data: Data, text: Callable[[Any], str], seed: int) -> list[str]:
    """The documents of the data with their answers, long ones cut, in an order drawn by `seed`."""
    whole = [text(row.prompt) + (row.solution or row.answer or "") for row in data.rows]
    parts = [part[cut : cut + PIECE] for part in whole for cut in range(0, len(part), PIECE)]
    Random(f"{seed}/pieces").shuffle(parts)
    return parts


def halves(parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Two parts of the text that share no piece; a single one is cut in the middle."""
    if len(parts) == 1:
        middle = len(parts[0]) // 2
        return [parts[0][:middle]], [parts[0][middle:]]
    return list(parts[::2]), list(parts[1::2])


def token_ids(tokenizer: Any, parts: Sequence[str], most: int, vocabulary: int) -> list[list[int]]:
    """Token ids of pieces without special tokens, until there are `most`.

    Raises StropError for a token that the model does not know.
    """
    rows: list[list[int]] = []
    left = most
    for part in parts:
        if left <= 0:
            break
        ids = tokenizer(part, add_special_tokens=False)["input_ids"][:left]
        if ids and max(ids) >= vocabulary:
            raise StropError(
                f"the tokenizer gives token {max(ids)} and the model knows {vocabulary}: put the model's own "
                "tokenizer files into its folder"
            )
        rows.append(ids)
        left -= len(ids)
    return rows


def start_token(tokenizer: Any, vocabulary: int) -> int | None:
    """The token that begins a sequence, where there is one."""
    token = tokenizer.bos_token_id
    return token if token is not None and token < vocabulary else None
