"""Trees drawn from a drafter's distributions, as ratio tests need them (arXiv 2305.09781, 2402.12374)."""

from collections.abc import Sequence

import torch

from strop.core.errors import StropError
from strop.decode.proposal import Proposal
from strop.decode.tree import DraftTree


def draw_tree(
    proposal: Proposal, root: int, widths: Sequence[int], replacement: bool, generator: torch.Generator
) -> DraftTree:
    """Draw the children of every node of depth d from `proposal.q[d]`: `widths[d]`, each at least 1.

    They are independent of one another, or distinct without `replacement`, then no more than q has tokens
    for. The tree ends with the shorter of widths and proposal, and depends on nothing but these arguments.

    Raises StropError for a proposal that does not hold what to draw from.
    """
    if proposal.kind != "sampled" or proposal.q is None:
        raise StropError(
            f"a {proposal.kind} proposal holds no distributions to draw a tree from: build a best-first tree"
        )
    q = proposal.q.double()
    q = q / q.sum(-1, keepdim=True)
    token, parent, depth, logq = [root], [-1], [0], [0.0]
    nodes = range(1)
    for level, (row, width) in enumerate(zip(q, widths, strict=False)):
        most = width if replacement else min(width, int(row.count_nonzero()))
        drawn = torch.multinomial(row.expand(len(nodes), -1), most, replacement, generator=generator)
        token += drawn.flatten().tolist()
        parent += [node for node in nodes for _ in range(most)]
        depth += [level + 1] * drawn.numel()
        above = torch.tensor(logq[nodes.start :], dtype=q.dtype)
        logq += (above[:, None] + row.log()[drawn]).flatten().tolist()
        nodes = range(nodes.stop, len(token))
    return DraftTree(token, parent, depth, logq, q, replacement)
