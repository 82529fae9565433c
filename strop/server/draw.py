"""How a sequence's next token is chosen: the draws of `strop.Model.generate`, with settings for each row.

The noise is a function of (seed, sample, position, token): it is the same whatever shares the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from strop.core.sampling import keyed_gumbel


@dataclass(frozen=True)
class Draw:
    """Draws tokens at a temperature from the likeliest ones that together reach `top_p`."""

    seed: int
    sample: int
    temperature: float
    top_p: float = 1.0

    def scores(self, logits: Tensor, position: int) -> Tensor:
        """Scores `[V]` whose largest is the token drawn at `position`, from float32 logits `[V]`."""
        scaled = logits / self.temperature
        if self.top_p < 1:
            scaled = _nucleus(scaled, self.top_p)
        return scaled + keyed_gumbel(
            len(logits), self.seed, self.sample, "token", position, device=logits.device
        )


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """The scores of the fewest tokens whose probabilities sum to `top_p`; minus infinity elsewhere."""
    ordered, order = scores.sort(descending=True, stable=True)
    shares = ordered.softmax(-1)
    beyond = shares.cumsum(-1) - shares >= top_p
    return scores.masked_fill(torch.zeros_like(beyond).scatter(0, order, beyond), -torch.inf)


class Drawing(LogitsProcessor):
    """The same for transformers' `generate`, where one sequence is written alone."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1]
        return torch.stack([self.draw.scores(row.float(), position) for row in scores])
