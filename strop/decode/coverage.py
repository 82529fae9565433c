"""Would trees pay? What a drafter says about held-out text that the target wrote.

Two things are measured, at places all over the text. Coverage, slot by slot: how much of the target's own
distribution the drafter's likeliest tokens have, the true tokens standing before every slot; no token is
drawn for it. And accepted tokens, the first ones in a row that a draft foresaw: at the temperature that a
text was written at, its tokens are as good as those that decoding would meet behind that place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from strop.decode.builder import BestFirst
from strop.decode.corpus import Rows
from strop.decode.dflash import DFlashDrafter
from strop.decode.proposal import Proposal
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
    """Accepted tokens a round if all paths through the k likeliest of each slot are drafted; 1: a chain."""
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
            parts.append(_measure(trunk, trunk(batch, draw_anchors(batch, anchors, draw)), approximator, ranks))
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
    drafter = _drafter(trunk, approximator)
    taken = [_taken(drafter.behind(*block), true) for block, true in zip(zip(h, ids), ids.tolist())]  # noqa: B905
    found["tree"] = torch.tensor(taken, dtype=torch.float32)
    return {name: value.cpu() for name, value in found.items()}
