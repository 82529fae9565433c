"""Rows that share a cache: read together, padded on the left, then written a token a step.

What is computed for a row is what `strop.Model.generate` computes for its prompt alone, but for rounding: in
float32 the tokens are the same. A row that is done or cancelled leaves the cache at once.
"""

import inspect

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from strop.core.cache import AttendingLayer, tensor_bytes
from strop.model import Model
from strop.server.row import Row


class Group:
    """A few rows and their cache."""

    def __init__(self, lm: Model, rows: list[Row]) -> None:
        """Nothing is computed before the first step, which reads the prompts."""
        self.lm, self.rows, self.cache = lm, rows, lm.new_cache()
        longest = max(len(row.prompt) for row in rows)
        pads = [longest - len(row.prompt) for row in rows]
        ids = [[lm.pad] * pad + row.prompt for pad, row in zip(pads, rows, strict=True)]
        self.ids = torch.tensor(ids, device=lm.device)
        """The tokens that the model has not read, `[B, q]`."""
        mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
        self.mask = torch.tensor(mask, device=lm.device)
        """Which columns of the cache, with these, are text: `[B, T]`."""
        self.accepted = inspect.signature(lm.model.forward).parameters

    def step(self) -> None:
        """Write one token in every row that is not over, and let go of those that are."""
        self._keep([i for i, row in enumerate(self.rows) if not row.over])
        if not self.rows:
            return
        tokens = self._choose(self._forward())
        for row, token in zip(self.rows, tokens, strict=True):
            row.take([token])
        self.ids = torch.tensor(tokens, device=self.ids.device)[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self._keep([i for i, row in enumerate(self.rows) if not row.over])

    def bytes(self) -> int:
        """Bytes of the cache."""
        return tensor_bytes(self.cache.layers)

    def _forward(self) -> Tensor:
        """Logits `[B, V]` behind every row."""
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]
        also = {"position_ids": positions, "logits_to_keep": 1}
        out = self.lm.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **{name: value for name, value in also.items() if name in self.accepted},
        )
        return out.logits[:, -1].float()

    def _choose(self, logits: Tensor) -> list[int]:
        tokens = logits.argmax(-1).tolist()
        for i, row in enumerate(self.rows):
            if row.draw is not None:
                tokens[i] = int(row.draw.scores(logits[i], row.position).argmax())
        return tokens

    def _keep(self, kept: list[int]) -> None:
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept]
        if kept:
            index = torch.tensor(kept, device=self.ids.device)
            self.ids, self.mask = self.ids[index], self.mask[index]
            if self.cache.get_seq_length():
                self.cache.batch_select_indices(index)


def divisible(cache: Cache) -> bool:
    """Whether rows can leave a cache of this kind."""
    stock = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in stock or isinstance(layer, AttendingLayer) for layer in cache.layers)
