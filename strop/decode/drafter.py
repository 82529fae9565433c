"""The contract of drafters: who proposes tokens for the target to verify."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from strop.core.errors import StropError
from strop.decode.proposal import Proposal


class Drafter(ABC):
    """Proposes what follows a text; holds the state of one sequence at a time."""

    horizon: int
    """Most tokens proposed ahead, L."""
    tap_layers: tuple[int, ...] = ()
    """Layers of the target whose outputs `inject` reads; layer j is the j-th block, counted from 0."""

    about: str = ""
    """Its shape, in short: what its pass costs depends on it."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.about or self.horizon})"

    def bytes(self, context: int) -> int:
        """What it holds of its own behind `context` tokens: weights, keys and values."""
        return 0

    @abstractmethod
    def reset(self) -> None:
        """Forget the sequence."""

    def inject(self, features: Tensor, first: int) -> None:  # noqa: B027 - not all read features
        """Take the target's tapped features `[n, k * d]` of the positions from `first` on."""

    @abstractmethod
    def propose(self, ids: Sequence[int], width: int) -> Proposal:
        """Candidates for the tokens behind `ids`, at most `width` in each row.

        The last of `ids` is the anchor: it is part of the text and the target has not read it yet.
        """

    def sample(self, ids: Sequence[int]) -> Proposal:
        """A proposal of kind `sampled`. Raises StropError for a drafter without whole distributions."""
        raise StropError(
            f"{type(self).__name__} has no distribution a depth to draw from: use a best-first tree"
        )
