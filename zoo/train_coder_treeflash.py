"""Train `coder-treeflash`: TreeFlash's approximator on the frozen backbone of `coder-dflash`.

    python zoo/train_coder_treeflash.py --out zoo/coder-treeflash [--device cuda] [--threads 2] [--seed 0]

The backbone is read from the folder `coder-dflash` beside the one that is written.
"""

from __future__ import annotations

import torch
from drafters import ANCHORS, GAMMA, arguments, finish, rows, target, train

from strop.decode.checkpoint import read_drafter
from strop.decode.training import Blockwise, Plan, treeflash_loss
from strop.decode.treeflash import Approximator

PLAN = Plan(steps=3000, batch=32, anchors=ANCHORS, lr=1e-3, gamma=GAMMA)
TOLD = {
    "about": "A TreeFlash drafter (arXiv 2606.03819) for the bundled `coder`: `coder-dflash` and, on top, "
    "what a slot says once the token before it is known.",
    "architecture": "the backbone of `coder-dflash`, unchanged, and an approximator 512 -> 2 x 768 -> 256; "
    "the 8 likeliest tokens of a slot are continued.",
    "loss": "The approximator alone was trained. Loss: divergence from the coder's distribution.",
}


def main() -> None:
    """Train, measure on held-out text, save."""
    args = arguments(__doc__)
    model, tokenizer = target(args)
    data, held_out = (rows(model, tokenizer, args, split) for split in ("train", "held_out"))
    net = read_drafter(args.out.parent / "coder-dflash", model).net.requires_grad_(False)
    trunk = Blockwise(model, net, GAMMA)
    torch.manual_seed(args.seed)
    approximator = Approximator(net.config).to(model.device)
    loss = treeflash_loss(trunk, approximator, kept=0.0)
    record = train(trunk, approximator, loss, data, PLAN, args)
    finish(trunk, approximator, held_out, record, args.out, TOLD)


if __name__ == "__main__":
    main()
