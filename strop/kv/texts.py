"""A model with its tokenizer, as what keeps pages for texts is given them: a strop.Model, or one of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from transformers import PreTrainedModel

from strop.core.errors import StropError, quoted

Text = str | Sequence[int]
"""Text, or its token ids."""
CONTEXTS, MOST = 4, 32_768
"""Contexts that pages hold where nothing else is said, and the tokens that they hold at most."""


@dataclass(frozen=True)
class Texts:
    """Texts to tokens and back, without special tokens."""

    model: PreTrainedModel
    tokenizer: Any
    """None: texts are given as token ids."""

    @classmethod
    def of(cls, model: Any, tokenizer: Any = None) -> "Texts":
        """From a transformers model, with a tokenizer or without, or from a `strop.Model`.

        Raises StropError for a recipe whose cache or drafts pages would silently replace.
        """
        if isinstance(model, PreTrainedModel):
            return cls(model, tokenizer)
        if not isinstance(getattr(model, "model", None), PreTrainedModel):
            raise StropError(f"{type(model).__name__} is no model: give a strop.Model or one of transformers")
        recipe = model.recipe
        if recipe.kv is not None or recipe.decode is not None:
            raise StropError(
                "pages replace the recipe's cache and take no drafts: give the model without them, by "
                "lm.with_(kv=None, decode=None)"
            )
        return cls(model.model, model.tokenizer if tokenizer is None else tokenizer)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text, as the model's generation settings say."""
        end = self.model.generation_config.eos_token_id
        return frozenset(() if end is None else [end] if isinstance(end, int) else end)

    def pages(self, asked: int | None, page: int) -> int:
        """How many pages of `page` tokens to keep."""
        if asked is not None:
            return asked
        config = self.model.config.get_text_config(decoder=True)
        tokens = min(CONTEXTS * getattr(config, "max_position_embeddings", MOST), MOST)
        return max(tokens // max(page, 1), 1)

    def encode(self, text: Text, special: bool = False) -> list[int]:
        """Token ids of a text, where `special` with those that the tokenizer puts around it.

        Raises StropError for none, for what is no text, and for ids that the model does not know.
        """
        if isinstance(text, str):
            ids = self._tokenizer()(text, add_special_tokens=special)["input_ids"]
        else:
            ids = _integers(text)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        if not ids:
            raise StropError("a text is empty: give every query and document at least one token")
        if not all(0 <= token < vocabulary for token in ids):
            raise StropError(
                f"a text has tokens that the model's {vocabulary} embeddings do not cover: encode it with "
                "the model's own tokenizer"
            )
        return ids

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation that the model is to answer, by the tokenizer's template."""
        if not self._tokenizer().chat_template:
            raise StropError(
                "the tokenizer has no chat template: give the conversation as text or token ids, or set "
                "tokenizer.chat_template"
            )
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str | None:
        """Token ids as text, special tokens left out; None without a tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.decode(ids, skip_special_tokens=True)

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise StropError("a text needs a tokenizer: give one beside the model, or give token ids")
        return self.tokenizer


def _integers(ids: Sequence[int]) -> list[int]:
    try:
        return [index(token) for token in ids]
    except TypeError:
        raise StropError(f"a text is a str or a sequence of token ids, not {quoted(ids)}") from None
