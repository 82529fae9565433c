"""Prompt lookup: propose what followed the last time the newest n-gram occurred in the context.

transformers' own; lossless, and worth it where output repeats input (code edits, quotes, summaries).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel

from strop.decode.base import DecodeMethod


@dataclass(frozen=True, kw_only=True)
class PromptLookup(DecodeMethod):
    """transformers' prompt-lookup decoding."""

    lossless: ClassVar[bool] = True

    tokens: int = 10
    """Most tokens proposed in one step."""
    ngram: int = 2
    """Longest n-gram that is looked up."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.ngram < 1:
            raise ValueError("tokens and ngram must be at least 1")

    @property
    def least_rollback(self) -> int:
        return self.tokens

    def options(self, model: PreTrainedModel) -> dict[str, Any]:
        return {"prompt_lookup_num_tokens": self.tokens, "max_matching_ngram_size": self.ngram}
