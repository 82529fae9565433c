"""What the audit measures need of a model."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache


class LanguageModel(Protocol):
    """A model with a recipe in force; `strop.Model` is one."""

    model: PreTrainedModel
    tokenizer: Any

    @property
    def device(self) -> torch.device: ...

    def new_cache(self) -> Cache:
        """An empty cache of the recipe's kv method."""
        ...

    def generate_ids(
        self, rows: Sequence[Sequence[int]], max_new_tokens: int, **options: Any
    ) -> list[list[int]]:
        """Continue token ids."""
        ...
