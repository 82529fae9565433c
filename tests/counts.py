"""How much is tried: a little in `make test`, at length under `make soak`, which runs tests marked `soak`."""

import os
from random import Random

SOAK = bool(os.environ.get("STROP_SOAK"))
SEED = int(os.environ.get("STROP_SEED", "0"))
"""Where the draws begin; a failure names it."""


def count(brief: int, soak: int) -> int:
    """How often, here."""
    return soak if SOAK else brief


def draws(name: str) -> Random:
    """The draws of one test."""
    return Random(f"{SEED}/{name}")
