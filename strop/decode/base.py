"""The decode family's contract: how `generate` spends the target's forward passes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from strop.core.method import Method
from strop.decode.builder import TreeBuilder
from strop.decode.calibrate import CostAware
from strop.decode.load import load_drafter
from strop.decode.speculative import speculative


class DecodeMethod(Method, ABC):
    """One way to propose and verify tokens. Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def least_rollback(self) -> int:
        """Tokens of one step that a cache must be able to take back."""

    @abstractmethod
    def options(self, model: PreTrainedModel) -> dict[str, Any]:
        """What transformers' `generate` of the model needs to be told; a batch holds one prompt at a time."""


@dataclass(frozen=True, kw_only=True)
class Drafted(DecodeMethod):
    """A method whose tokens come from a drafter and are verified as a tree."""

    lossless: ClassVar[bool] = True

    drafter: str
    """`ngram`, `zoo:NAME`, or the folder of a drafter or of a small model with the same tokenizer."""

    @abstractmethod
    def builder(self) -> TreeBuilder | CostAware:
        """What makes trees of proposals."""

    def options(self, model: PreTrainedModel) -> dict[str, Any]:
        return {"custom_generate": speculative(load_drafter(self.drafter, model), self.builder())}

    def settings(self) -> str:
        return self.spell(Path(self.drafter).name.removeprefix("zoo:"), "drafter")
