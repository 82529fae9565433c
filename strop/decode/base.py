"""The decode family's contract: how `generate` spends the target's forward passes."""

from abc import ABC, abstractmethod
from typing import Any

from strop.core.method import Method


class DecodeMethod(Method, ABC):
    """One way to propose and verify tokens. Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Most tokens proposed in one step, all of which may be taken back."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What transformers' `generate` needs to be told; a batch holds one prompt at a time."""
