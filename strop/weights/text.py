"""Calibration text: what flows through a model while a method looks on.

Rows are cut from the text at seeded places, so that the same settings give the same rows. Left out: chat
templates, since the text is joined as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strop.core.errors import StropError
from strop.tasks.data import Data, bundled_training, read_data

Text = Callable[["Calibrated"], Tensor]
"""Gives the calibration text `[samples, length]`, token ids, that a method asks for."""


@dataclass(frozen=True)
class Calibrated:
    """The fields of a method that looks at text."""

    calibration: str | None = None
    """A file of text or JSON Lines; None takes bundled text that models here are trained on."""
    samples: int = 128
    """Rows of text."""
    length: int = 512
    """Tokens of a row."""
    seed: int = 0
    """Where rows are cut."""

    def __post_init__(self) -> None:
        super_check = getattr(super(), "__post_init__", None)
        if super_check:
            super_check()
        for name in ("samples", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def calibration_rows(tokenizer: Any, model: str, asked: Calibrated) -> Tensor:
    """The rows `[samples, length]` that a method asks for, as the tokenizer of `model` reads them.

    Raises StropError when the file is wrong or holds fewer tokens than one row.
    """
    data = read_data(Path(asked.calibration)) if asked.calibration else bundled_training(model)
    ids = torch.tensor(joined(tokenizer, data, 4 * asked.samples * asked.length))
    if len(ids) < asked.length:
        raise StropError(
            f"{data.name} holds {len(ids):,} tokens, fewer than one row of {asked.length}: give more text to "
            "calibrate on, or a smaller length"
        )
    draw = torch.Generator().manual_seed(asked.seed)
    starts = torch.randint(len(ids) - asked.length + 1, (asked.samples,), generator=draw)
    return torch.stack([ids[start : start + asked.length] for start in starts.tolist()])


def joined(tokenizer: Any, data: Data, enough: int) -> list[int]:
    """Token ids of the rows of `data`, one after another, until there are `enough`."""
    ids: list[int] = []
    for row in data.rows:
        prompt = (
            row.prompt if isinstance(row.prompt, str) else "\n".join(said["content"] for said in row.prompt)
        )
        ids += tokenizer(prompt + (row.solution or row.answer or ""), verbose=False)["input_ids"]
        if len(ids) >= enough:
            break
    return ids
