"""Exact match of worked problems when the solution is written through a coded cache.

All problems of a batch have one length, so rows need no padding and advance in step; the prompt is read once
and handed to every cache, as it would be by its own prefill (attention over the prompt comes before coding).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from strop.model import Model
from strop.tasks.base import Example, is_right
from strop.tasks.reasoning import Size, final_answer, problems

SLACK = 14
"""Tokens beyond the right solution's length that an answer may take: one line more."""


def even_problems(seeds: int, each: int, facts: int, steps: int) -> list[Example]:
    """`seeds * each` held-out `sum` problems of one length, those of a seed side by side."""
    size = {"sum": Size((facts, facts), (steps, steps), (140, 140), (270, 270))}
    return [p for seed in range(seeds) for p in problems(each, seed, kinds=("sum",), sizes=size)]


@dataclass(frozen=True)
class Prompted:
    """Problems whose prompts are read, without any damage yet."""

    examples: Sequence[Example]
    cache: Cache
    first: Tensor
    """The first token of each solution `[B]`."""
    steps: int
    """Tokens to write."""


@torch.no_grad()
def read_prompts(lm: Model, examples: Sequence[Example]) -> Prompted:
    """Read the prompts; they must be of one length in tokens."""
    rows = [lm.encode(example.prompt) for example in examples]
    if len({len(row) for row in rows}) > 1:
        raise ValueError("the problems of a batch must have prompts of one length")
    cache = DynamicCache(config=lm.model.config)
    out = lm.model(torch.tensor(rows, device=lm.device), past_key_values=cache, logits_to_keep=1)
    longest = max(len(lm.encode(example.solution or "")) for example in examples)
    return Prompted(examples, cache, out.logits[:, -1].argmax(-1), longest + SLACK)


@torch.no_grad()
def solve(model: PreTrainedModel, prompted: Prompted, cache: Cache) -> Tensor:
    """Greedy solutions `[B, steps]` through an empty `cache`, to which the prompts are handed first."""
    for index, layer in enumerate(prompted.cache.layers):
        cache.update(layer.keys, layer.values, index)
    token, written = prompted.first, []
    for _ in range(prompted.steps):
        written.append(token)
        token = model(token[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
    return torch.stack(written, dim=1)


def texts(lm: Model, tokens: Tensor) -> list[str]:
    """What was written up to the end of text, of each row."""
    end = lm.tokenizer.eos_token_id
    rows = [row[: row.index(end)] if end in row else row for row in tokens.tolist()]
    return lm.tokenizer.batch_decode(rows)


def right(lm: Model, prompted: Prompted, tokens: Tensor, seeds: int) -> list[float]:
    """Share of right answers for each seed, 0 to 1."""
    said = texts(lm, tokens)
    marks = [is_right(e, text, final_answer) for e, text in zip(prompted.examples, said, strict=True)]
    return torch.tensor(marks, dtype=torch.float64).view(seeds, -1).mean(1).tolist()
