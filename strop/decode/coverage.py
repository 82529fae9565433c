"""Would trees pay? What a drafter says about held-out text, beside the target's own distributions.

The true tokens stand before every slot, so nothing here depends on how a tree would be built, and no token is
drawn. Chains live on top-1 coverage, trees on the gap between it and top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.decode.corpus import Rows
from strop.decode.training import Blocks, Blockwise, divergence, draw_anchors
from strop.decode.treeflash import Approximator

RANKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Coverage:
    """Means over blocks, one value a slot, L of them."""

    kl: list[float]
    """KL(p || q) in nats."""
    tvd: list[float]
    """Total variation distance, 0 to 1."""
    top: dict[int, list[float]]
    """Probability, by the target, of the drafter's k likeliest tokens."""
    chain: float
    """Accepted tokens a round if the likeliest token of every slot is drafted, at temperature 1."""
    tree: dict[int, float]
    """The same for every path through the k likeliest of each slot: what the widest such tree could reach."""


@torch.no_grad()
def coverage(
    trunk: Blockwise, rows: Rows, anchors: int, approximator: Approximator | None = None, seed: int = 0
) -> Coverage:
    """Measure a drafter on held-out rows, `anchors` blocks in each, corrected if there is an approximator."""
    draw, parts, whole = torch.Generator().manual_seed(seed), [], []
    for index in torch.arange(len(rows)).split(16):
        batch = rows.at(index, trunk.target.device)
        blocks = trunk(batch, draw_anchors(batch, anchors, draw))
        whole.append((blocks.weight > 0).all(-1).flatten().cpu())
        parts.append(_measure(trunk, blocks, approximator))
    kept = torch.cat(whole)
    table = {name: torch.cat([part[name] for part in parts])[kept] for name in parts[0]}
    top = {k: table[f"top {k}"] for k in RANKS}
    return Coverage(
        kl=table["kl"].mean(0).tolist(),
        tvd=table["tvd"].mean(0).tolist(),
        top={k: cover.mean(0).tolist() for k, cover in top.items()},
        chain=_reach(top[1]),
        tree={k: _reach(cover) for k, cover in top.items() if k > 1},
    )


def _measure(trunk: Blockwise, blocks: Blocks, approximator: Approximator | None) -> dict[str, Tensor]:
    logp = trunk.head(blocks.hidden).float().log_softmax(-1)
    if approximator is None:
        logits = trunk.head(blocks.n).float()
    else:
        o = approximator(trunk.embed(blocks.ids[..., :-1]), blocks.n)
        logits = trunk.head(trunk.net.norm(blocks.h + o)).float()
    p, q = logp.exp(), logits.softmax(-1)
    found = {"kl": divergence(logp, logits), "tvd": (p - q).abs().sum(-1) / 2}
    order = q.topk(max(RANKS), dim=-1).indices
    mass = p.gather(-1, order).cumsum(-1)
    found |= {f"top {k}": mass[..., k - 1] for k in RANKS}
    return {name: value.flatten(0, 1).cpu() for name, value in found.items()}


def _reach(cover: Tensor) -> float:
    """Expected accepted tokens when each slot is right with the probabilities of `cover` `[n, L]`."""
    return float(cover.cumprod(-1).sum(-1).mean())


def lines(plain: Coverage, corrected: Coverage | None = None) -> Sequence[str]:
    """The diagnosis in words."""
    ahead = plain.tree[4] / max(plain.chain, 1e-9) - 1
    said = [
        f"A chain of the likeliest tokens gets {plain.chain:.2f} accepted, the four likeliest of each slot "
        f"{plain.tree[4]:.2f} (+{ahead:.0%}): " + ("trees can pay." if ahead > 0.1 else "a chain will do.")
    ]
    if corrected is not None:
        gain = corrected.chain / max(plain.chain, 1e-9) - 1
        said.append(f"Knowing the token before, the chain gets {corrected.chain:.2f} ({gain:+.0%}).")
    return said
