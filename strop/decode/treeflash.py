"""TreeFlash (arXiv 2606.03819): what a drafted slot says, corrected for the token drafted before it.

An approximator shared by all slots reads the embedding of the previous token and the slot's normed state, and
adds a correction to the state. So a slot's distribution depends on (slot, previous token) alone, and the
candidates of every slot are tabulated against those of the slot before in one batched call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from strop.decode.dflash import DFlashDrafter, DFlashNet
from strop.decode.proposal import Proposal


class Approximator(nn.Module):
    """The correction of a slot's state; zero at first, so that the drafter is exactly DFlash."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.norm = Qwen3RMSNorm(d, eps=1e-6)
        self.ug = nn.Linear(2 * d, 2 * f)
        self.d = nn.Linear(f, d, bias=False)
        nn.init.zeros_(self.d.weight)

    def forward(self, previous: Tensor, n: Tensor) -> Tensor:
        """`[..., d]` to add to a slot's state: from the previous token's embedding and the normed state.

        Either may have dimensions of size 1 that the other has not; what they stand for is computed once.
        """
        d = n.shape[-1]
        of_token = linear(self.norm(previous), self.ug.weight[:, :d], self.ug.bias)
        u, g = (of_token + linear(n, self.ug.weight[:, d:])).chunk(2, dim=-1)
        return self.d(silu(g) * u)


class TreeFlashDrafter(DFlashDrafter):
    """Proposes, for each slot, a distribution for each likely token before it."""

    def __init__(
        self, net: DFlashNet, approximator: Approximator, target: PreTrainedModel, rows: int
    ) -> None:
        """`rows` is M: how many candidates of a slot are continued."""
        super().__init__(net, target)
        self.approximator = approximator.eval()
        self.modules.append(self.approximator)
        self.rows = min(rows, len(self.embed.weight))
        self.about += f", {self.rows} rows"

    def propose(self, ids: Sequence[int], width: int) -> Proposal:
        h = self.slots(ids[-1])
        n = self.net.norm(h)
        likely = self.head(n[:-1]).topk(self.rows).indices
        first = self._best(h[:1], n[:1], likely.new_full((1, 1), ids[-1]), width)
        rest = self._best(h[1:], n[1:], likely, width)
        logp, tokens = (
            torch.cat([one.expand(-1, self.rows, -1), more]) for one, more in zip(first, rest, strict=True)
        )
        return Proposal("markov", tokens.cpu(), logp.cpu(), _links(tokens, likely).cpu())

    def _best(self, h: Tensor, n: Tensor, previous: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and tokens of the best `width` of every row."""
        logits = self.corrected(h, n, previous)
        best, tokens = logits.topk(min(width, logits.shape[-1]), dim=-1)
        return best - logits.logsumexp(-1, keepdim=True), tokens

    def corrected(self, h: Tensor, n: Tensor, previous: Tensor) -> Tensor:
        """Logits `[L, M, V]` float32 of slots `h` and `n` `[L, d]` behind each of `previous` `[L, M]`."""
        states = h[:, None] + self.approximator(self.embed(previous), n[:, None])
        return self.head(self.net.norm(states)).float()


def _links(tokens: Tensor, likely: Tensor) -> Tensor:
    """Where each candidate `[L, M, K]` is among the next slot's previous tokens `[L - 1, M]`; -1: nowhere."""
    same = tokens[:-1, ..., None] == likely[:, None, None]
    found = torch.where(same.any(-1), same.int().argmax(-1), -1)
    return torch.cat([found, torch.full_like(tokens[:1], -1)])
