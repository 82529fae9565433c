"""Train `coder-dflash`: a block drafter for the bundled coder, on text that the coder wrote itself.

python zoo/train_coder_dflash.py --out zoo/coder-dflash [--device cuda] [--threads 2] [--seed 0]

A folder with `training.json` is not trained again; without `metrics.json` it is measured.
"""

from __future__ import annotations

from drafters import ANCHORS, GAMMA, arguments, finish, finished, network, target, train

from strop.decode.training import Blockwise, Plan, dflash_loss

PLAN = Plan(steps=8000, batch=32, anchors=ANCHORS, lr=1.5e-3, gamma=GAMMA)

TOLD = {
    "about": "A DFlash drafter (arXiv 2602.06036) for the bundled `coder`: seven tokens ahead in one pass.",
    "architecture": "2 layers of the coder's shape, block of 8; its context are the outputs of the coder's "
    "layers 1, 3 and 5.",
    "loss": "Loss: cross-entropy with the tokens that the coder wrote.",
}


def main() -> None:
    """Train, save, measure on held-out text."""
    args = arguments(__doc__)
    model, tokenizer = target(args)
    if not finished(args.out):
        trunk = Blockwise(model, network(model, tokenizer.pad_token_id, args.seed), GAMMA)
        train(trunk, None, dflash_loss(trunk), tokenizer, PLAN, args)
    finish(model, tokenizer, args, TOLD)


if __name__ == "__main__":
    main()
