"""Drafters and verification: fewer passes of the target model per token."""

from strop.decode.base import DecodeMethod
from strop.decode.prompt_lookup import PromptLookup

__all__ = ["DecodeMethod", "PromptLookup"]
