"""What a drafter says about the next tokens, as data: one table form for every kind of drafter.

Depth d of the draft (1 to L) has M rows, each a distribution over the token there given one candidate for
the token before; `next_row` links a candidate to the row of the next depth that continues it. One row a depth
makes marginals (DFlash), a row per candidate a first-order Markov chain (TreeFlash), a row per node any trie.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["marginal", "markov", "sampled"]


@dataclass(frozen=True)
class Proposal:
    """Candidates `[L, M, K]`, the best first in every row; tensors live on the host."""

    kind: Kind
    tokens: Tensor
    """Token ids, int64."""
    logp: Tensor
    """Their log-probabilities given the row, float; minus infinity where a row has no such candidate."""
    next_row: Tensor
    """Row of the next depth that continues a candidate, int64; -1 where none does."""
    q: Tensor | None = None
    """Whole distributions `[L, V]`, one a depth, float32: what a `sampled` tree is drawn from."""

    @property
    def horizon(self) -> int:
        """Tokens drafted ahead, L."""
        return self.tokens.shape[0]

    def cut(self, depths: int) -> "Proposal":
        """The first `depths` depths alone."""
        if depths >= self.horizon:
            return self
        links = self.next_row[:depths].clone()
        links[-1:] = -1
        q = None if self.q is None else self.q[:depths]
        return Proposal(self.kind, self.tokens[:depths], self.logp[:depths], links, q)

    def check(self) -> None:
        """Raise ValueError unless the tables fit together."""
        if self.tokens.dim() != 3 or not self.tokens.shape == self.logp.shape == self.next_row.shape:
            raise ValueError("a proposal's tables are not of one shape [L, M, K]")
        rows, links = self.tokens.shape[1], self.next_row
        if (links >= rows).any() or (links < -1).any() or (links[-1:] != -1).any():
            raise ValueError("a proposal links to a row that is not there")
        if not ((self.logp[..., 1:] <= self.logp[..., :-1]).all() and (self.logp <= 0).all()):
            raise ValueError("a proposal's candidates are not in order of probability")


NOTHING = Proposal(
    "markov", *(torch.zeros(0, 1, 1, dtype=kind) for kind in (torch.int64, torch.float32, torch.int64))
)
"""No candidates at all."""


def marginals(logits: Tensor, width: int, sampled: bool = False) -> Proposal:
    """A proposal from one distribution a depth: logits `[L, V]`, the best `width` candidates of each.

    A `sampled` one holds the whole distributions as well.
    """
    logits = logits.float()
    best, tokens = logits.topk(min(width, logits.shape[-1]), dim=-1)
    logp = best - logits.logsumexp(-1, keepdim=True)
    tokens, logp = tokens[:, None].cpu(), logp[:, None].cpu()
    next_row = torch.zeros_like(tokens)
    next_row[-1:] = -1
    if sampled:
        return Proposal("sampled", tokens, logp, next_row, logits.softmax(-1).cpu())
    return Proposal("marginal", tokens, logp, next_row)
