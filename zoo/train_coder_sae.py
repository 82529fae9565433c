"""Train `coder-sae`: a sparse autoencoder of the bundled coder's residual stream, TopK.

python zoo/train_coder_sae.py --out zoo/coder-sae [--device cuda] [--threads 2] [--seed 0]
"""

from __future__ import annotations

from autoencoders import make
from family import parse

from strop.audit.sae_training import Settings


def main() -> None:
    """Train the folder, or finish it."""
    args = parse(__doc__)
    settings = Settings(layer=3, m=4096, k=32, tokens=20_000_000, batch=4096, idle=1_000_000, seed=args.seed)
    make("coder", settings, args)


if __name__ == "__main__":
    main()
