"""The text that a generation writes, and when it is done."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class Text:
    """One sequence: its tokens, the rules of transformers that end it, and who hears of new tokens."""

    def __init__(
        self,
        ids: Tensor,
        processors: LogitsProcessorList | None,
        criteria: StoppingCriteriaList | None,
        limit: int,
        streamer: BaseStreamer | None,
    ) -> None:
        """`ids` `[1, T]` is the prompt; `limit` the most tokens with it."""
        self.ids, self.tokens, self.limit = ids, ids[0].tolist(), limit
        self.processors = processors if processors is not None else LogitsProcessorList()
        self.criteria, self.streamer = criteria, streamer

    @property
    def left(self) -> int:
        """Tokens that may still be written."""
        return self.limit - len(self.tokens)

    def emit(self, tokens: Sequence[int]) -> tuple[bool, int]:
        """Write `tokens` up to the first that ends the text; whether one did, and how many were written."""
        new = torch.tensor([tokens], dtype=self.ids.dtype, device=self.ids.device)
        longer, start = torch.cat([self.ids, new], dim=1), len(self.tokens)
        done, count = False, 0
        while not done and count < len(tokens):
            count += 1
            done = self._ends(longer[:, : start + count])
        self.ids = longer[:, : start + count]
        self.tokens += tokens[:count]
        if self.streamer is not None:
            self.streamer.put(new[0, :count].cpu())
        return done, count

    def _ends(self, ids: Tensor) -> bool:
        if ids.shape[1] >= self.limit:
            return True
        return bool(self.criteria) and bool(self.criteria(ids, None).all())
