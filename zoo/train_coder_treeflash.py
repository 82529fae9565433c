"""Train `coder-treeflash`: TreeFlash's approximator on the frozen backbone of `coder-dflash`.

    python zoo/train_coder_treeflash.py --out zoo/coder-treeflash [--device cuda] [--threads 2] [--seed 0]

The backbone is read from the folder `coder-dflash` beside the one that is written. A
folder with `training.json` is not trained again; without `metrics.json` it is measured.
"""

from __future__ import annotations

from drafters import ANCHORS, GAMMA, arguments, finish, finished, target, train

from strop.decode.checkpoint import read_drafter
from strop.decode.fit import new_approximator
from strop.decode.training import Blockwise, Plan, treeflash_loss

PLAN = Plan(steps=3000, batch=32, anchors=ANCHORS, lr=1e-3, gamma=GAMMA)
TOLD = {
    "about": "A TreeFlash drafter (arXiv 2606.03819) for the bundled `coder`: `coder-dflash` and, on top, "
    "what a slot says once the token before it is known.",
    "architecture": "the backbone of `coder-dflash`, unchanged, and an approximator 512 -> 2 x 768 -> 256; "
    "the 8 likeliest tokens of a slot are continued.",
    "loss": "The approximator alone was trained. Loss: divergence from the coder's distribution.",
}


def main() -> None:
    """Train, save, measure on held-out text."""
    args = arguments(__doc__)
    model, tokenizer = target(args)
    if not finished(args.out):
        net = read_drafter(args.out.parent / "coder-dflash", model).net.requires_grad_(False)
        trunk = Blockwise(model, net, GAMMA)
        approximator = new_approximator(net.config, args.seed).to(model.device)
        train(trunk, approximator, treeflash_loss(trunk, approximator), tokenizer, PLAN, args)
    finish(model, tokenizer, args, TOLD)


if __name__ == "__main__":
    main()
