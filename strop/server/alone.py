"""A row written by transformers' `generate`, one at a time: recipes that draft, and models whose generation
config changes scores in ways that belong to `generate`.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from strop.decode.stats import Stats
from strop.model import Model
from strop.server.draw import Drawing
from strop.server.row import Row

NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "sequence_bias": (),
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
}
"""Settings of a generation config that change scores, where they do nothing."""


def needs_generate(lm: Model) -> bool:
    """Whether only `generate` writes what the recipe and the model's generation config say."""
    config = lm.model.generation_config
    settings = [(getattr(config, name, None), neutral) for name, neutral in NEUTRAL.items()]
    return lm.recipe.decode is not None or any(value and value != neutral for value, neutral in settings)


def write_alone(lm: Model, row: Row, cache: Cache) -> Stats | None:
    """Write a row until it is over or `generate` ends, which may come first; what drafts brought, if any."""
    ids = torch.tensor([row.prompt], device=lm.device)
    listener, decoding = _Listener(row), dict(lm.decoding)
    drafted = decoding.get("custom_generate")
    if drafted is not None:
        decoding["custom_generate"] = partial(drafted, streamer=listener)
    lm.model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=row.most,
        logits_processor=[] if row.draw is None else [Drawing(row.draw)],
        stopping_criteria=[_Over(row)],
        streamer=listener,
        do_sample=False,
        num_beams=1,
        pad_token_id=lm.pad,
        eos_token_id=sorted(row.ends) or [lm.vocabulary],
        **decoding,
    )
    return drafted.stats if drafted is not None else None


class _Listener(BaseStreamer):
    """Hands new tokens to a row; the prompt comes first, and is skipped."""

    def __init__(self, row: Row) -> None:
        self.row, self.begun = row, False

    def put(self, value: Tensor) -> None:
        if self.begun:
            self.row.take(value.flatten().tolist())
        self.begun = True

    def end(self) -> None:
        """Nothing is held back."""


class _Over(StoppingCriteria):
    """Ends a generation whose row is over."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.row.over, device=input_ids.device)
