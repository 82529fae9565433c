"""Train `coder-dflash`: a block drafter for the bundled coder, on text that the coder wrote itself.

python zoo/train_coder_dflash.py --out zoo/coder-dflash [--device cuda] [--threads 2] [--seed 0]
"""

from __future__ import annotations

from drafters import ANCHORS, GAMMA, arguments, finish, network, rows, target, train

from strop.decode.training import Blockwise, Plan, dflash_loss

PLAN = Plan(steps=8000, batch=32, anchors=ANCHORS, lr=1.5e-3, gamma=GAMMA)


def main() -> None:
    """Train, measure on held-out text, save."""
    args = arguments(__doc__)
    model, tokenizer = target(args)
    data, held_out = (rows(model, tokenizer, args, split) for split in ("train", "held_out"))
    trunk = Blockwise(model, network(model, tokenizer.pad_token_id, args.seed), GAMMA)
    record = train(trunk, trunk.net, dflash_loss(trunk), data, PLAN, args)
    finish(trunk, None, 0, held_out, record, args.out)


if __name__ == "__main__":
    main()
