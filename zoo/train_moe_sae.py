"""Train `moe-sae`: a sparse autoencoder of a bundled mixture's residual stream, TopK.

python zoo/train_moe_sae.py --out zoo/moe-sae [--device cuda] [--threads 2] [--seed 0]

With --seed 1 it is the autoencoder of `moe-1`, the mixture of that seed.
"""

from __future__ import annotations

from autoencoders import make
from family import parse

from strop.audit.sae_training import Settings


def main() -> None:
    """Train the folder, or finish it."""
    args = parse(__doc__)
    settings = Settings(layer=1, m=2048, k=32, tokens=10_000_000, batch=4096, idle=500_000, seed=args.seed)
    make("moe-1" if args.seed == 1 else "moe", settings, args)


if __name__ == "__main__":
    main()
