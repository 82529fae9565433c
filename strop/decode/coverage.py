"""Would trees pay? What a drafter says about held-out text that the target wrote.

Two things are measured, at places all over the text. Coverage, slot by slot: how much of the target's own
distribution the drafter's likeliest tokens have, the true tokens standing before every slot; no token is
drawn for it. And accepted tokens, the first ones in a row that a draft foresaw: at the temperature that a
text was written at, its tokens are as good as those that decoding would meet behind that place.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from strop.decode.builder import BestFirst
from strop.decode.corpus import Rows
from strop.decode.proposal import Proposal, marginals
from strop.decode.training import Blocks, Blockwise, divergence, draw_anchors
from strop.decode.treeflash import Approximator, TreeFlashDrafter

RANKS = (1, 2, 4, 8)
NODES = 16
"""Nodes of the best-first trees that are tried."""
PAYS = 0.1
"""Share of accepted tokens by which such a tree must be ahead of a chain."""
CANDIDATES = 8
"""M of TreeFlash: tokens of a slot for which the next one is tabulated."""


@dataclass(frozen=True)
class Coverage:
    """Means over blocks in one kind of text; lists have one value a slot, L of them."""

    blocks: int
    """Blocks that were looked at."""
    kl: list[float]
    """KL(p || q) in nats."""
    tvd: list[float]
    """Total variation distance, 0 to 1."""
    top: dict[int, list[float]]
    """Coverage: probability, by the target, of the drafter's k likeliest tokens."""
    accepted: dict[int, float]
    """Accepted tokens a round if all paths through the k likeliest of each slot are drafted; 1: a chain.

    A correction knows every token before a slot here, while drafting it knows the CANDIDATES likeliest.
    """
    tree: float
    """Accepted tokens a round if the best-first tree of NODES nodes is drafted."""


@torch.no_grad()
def coverage(
    trunk: Blockwise,
    rows: Rows,
    anchors: int,
    approximator: Approximator | None = None,
    seed: int = 0,
    ranks: Sequence[int] = RANKS,
) -> dict[str, Coverage]:
    """Measure a drafter on held-out rows, "greedy" and "sampled" ones apart, `anchors` blocks in each row.

    It is corrected if there is an approximator. A kind of text without a whole block is left out.
    """
    found = {}
    for kind, chosen in {"greedy": rows.greedy, "sampled": ~rows.greedy}.items():
        index = chosen.nonzero()[:, 0]
        draw, parts = torch.Generator().manual_seed(seed), []
        for some in index.split(16) if len(index) else ():
            batch = rows.at(some, trunk.target.device)
            parts.append(
                _measure(trunk, trunk(batch, draw_anchors(batch, anchors, draw)), approximator, ranks)
            )
        table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
        if table and len(table["kl"]):
            found[kind] = _mean(table, ranks)
    return found


def _mean(table: Mapping[str, Tensor], ranks: Sequence[int]) -> Coverage:
    """Of one value a block, `[n, L]` or, for trees, `[n]`."""
    return Coverage(
        blocks=len(table["kl"]),
        kl=table["kl"].mean(0).tolist(),
        tvd=table["tvd"].mean(0).tolist(),
        top={k: table[f"top {k}"].mean(0).tolist() for k in ranks},
        accepted={k: float(_in_a_row(table["rank"] < k).mean()) for k in ranks},
        tree=float(table["tree"].mean()),
    )


def _in_a_row(hit: Tensor) -> Tensor:
    """How many of the first slots of each block are hits, of `[n, L]` bool."""
    return hit.float().cumprod(-1).sum(-1)


def _measure(
    trunk: Blockwise, blocks: Blocks, approximator: Approximator | None, ranks: Sequence[int]
) -> dict[str, Tensor]:
    """What is measured of each block that lies in the text as a whole; `rank` is the true token's."""
    whole = (blocks.weight > 0).all(-1)
    h, n, ids, hidden = (part[whole] for part in (blocks.h, blocks.n, blocks.ids, blocks.hidden))
    logp = trunk.head(hidden).float().log_softmax(-1)
    if approximator is None:
        logits = trunk.head(n).float()
    else:
        o = approximator(trunk.embed(ids[:, :-1]), n)
        logits = trunk.head(trunk.net.norm(h + o)).float()
    p, q = logp.exp(), logits.softmax(-1)
    order = q.topk(max(ranks), dim=-1).indices
    mass = p.gather(-1, order).cumsum(-1)
    same = order == ids[:, 1:, None]
    found = {"kl": divergence(logp, logits), "tvd": (p - q).abs().sum(-1) / 2}
    found |= {f"top {k}": mass[..., k - 1] for k in ranks}
    found["rank"] = torch.where(same.any(-1), same.int().argmax(-1), max(ranks))
    taken = [
        _taken(proposal, true)
        for proposal, true in zip(_proposals(trunk, h, ids, approximator), ids.tolist(), strict=True)
    ]
    found["tree"] = torch.tensor(taken, dtype=torch.float32)
    return {name: value.cpu() for name, value in found.items()}


class _Denoised(TreeFlashDrafter):
    """Proposes from slots that are known."""

    h: Tensor
    """Their states before the final norm, `[L, d]`."""

    def slots(self, anchor: int) -> Tensor:
        return self.h


def _proposals(
    trunk: Blockwise, h: Tensor, ids: Tensor, approximator: Approximator | None
) -> Iterator[Proposal]:
    """What the drafter proposes for each block, of states `[n, L, d]` and true tokens `[n, N]`."""
    if approximator is None:
        yield from (marginals(trunk.head(trunk.net.norm(states)), NODES) for states in h)
        return
    drafter = _Denoised(trunk.net, approximator, trunk.target, CANDIDATES)
    for drafter.h, anchor in zip(h, ids[:, 0].tolist(), strict=True):
        yield drafter.propose([anchor], NODES)


def _taken(proposal: Proposal, ids: Sequence[int]) -> int:
    """Tokens behind the first of `ids` that the best-first tree of a proposal foresaw."""
    pops = BestFirst(proposal, ids[0])
    tree, node = pops.tree(sum(1 for _ in islice(pops, NODES))), 0
    for count, token in enumerate(ids[1:]):
        node = tree.child.get((node, token), 0)
        if not node:
            return count
    return len(ids) - 1


def lines(plain: Mapping[str, Coverage], corrected: Mapping[str, Coverage] | None = None) -> Sequence[str]:
    """The diagnosis in words: what was accepted, and whether trees are worth trying."""
    if not plain:
        return ["The target ended its held-out texts so soon that no block fits in: give other texts."]
    said = []
    for kind, found in plain.items():
        told = f"{kind.capitalize()} text, tokens accepted a round: {_accepted(found)}"
        if corrected is not None:
            told += f"; knowing the token before, {_accepted(corrected[kind])}"
        said.append(told + ".")
    best = plain if corrected is None else corrected
    ahead = [kind for kind, found in best.items() if _gain(found) >= PAYS]
    if ahead:
        said.append(
            f"Trees are at least {PAYS:.0%} ahead on {' and '.join(ahead)} text: they pay where verifying "
            f"{NODES} tokens takes little longer than {len(next(iter(best.values())).kl)}, which the "
            "cost-aware rule weighs while decoding."
        )
    else:
        said.append(f"Trees are less than {PAYS:.0%} ahead: a chain will do.")
    if max(found.tree for found in best.values()) < 1:
        said.append("That is little so far: train on more tokens and for more steps.")
    return said


def _accepted(found: Coverage) -> str:
    return (
        f"{found.accepted[1]:.2f} of a chain, {found.tree:.2f} ({_gain(found):+.0%}) of the best-first tree "
        f"of {NODES} nodes"
    )


def _gain(found: Coverage) -> float:
    """Share by which the tree is ahead of the chain."""
    return found.tree / max(found.accepted[1], 1e-9) - 1
