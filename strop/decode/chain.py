"""DFlash's own way to use a block (arXiv 2602.06036): the likeliest tokens in a row, verified as a chain."""

from dataclasses import dataclass

from strop.decode.base import Drafted
from strop.decode.builder import Chain, TreeBuilder


@dataclass(frozen=True, kw_only=True)
class DFlash(Drafted):
    """Verify one chain."""

    tokens: int | None = None
    """Most tokens of it; None: as many as the drafter sees ahead."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")

    @property
    def least_rollback(self) -> int:
        return self.tokens or 1

    def builder(self) -> TreeBuilder:
        return Chain(self.tokens)
