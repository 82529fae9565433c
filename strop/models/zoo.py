"""Where the bundled models are: ordinary transformers folders, each with a card.

They live in `zoo/` beside the package, or wherever the environment variable STROP_ZOO points.
Nothing here loads a model, so nothing here needs a tensor library.
"""

from __future__ import annotations

import os
from pathlib import Path

from strop.core.errors import StropError, quoted
from strop.core.files import did_you_mean

CONFIGS = ("config.json", "cfg.json")
"""What a folder is known by; the second is of a sparse autoencoder."""


def zoo_root() -> Path:
    """The folder of the bundled models: $STROP_ZOO, else `zoo/` next to the package."""
    named = os.environ.get("STROP_ZOO")
    root = Path(named) if named else Path(__file__).resolve().parents[2] / "zoo"
    if not root.is_dir():
        where = "STROP_ZOO names" if named else "the bundled models should be in"
        raise StropError(f"There is no folder {root}, which {where}; set STROP_ZOO to their place.")
    return root


def zoo_names() -> list[str]:
    """Names of what is there, sorted: folders with weights and a config, a model's or an autoencoder's."""
    found = (p for p in zoo_root().iterdir() if any((p / name).is_file() for name in CONFIGS))
    return sorted(p.name for p in found if any(p.glob("*.safetensors")))


def zoo_path(name: str) -> Path:
    """The folder of one bundled model, for `from_pretrained`."""
    names = zoo_names()
    if name in names:
        return zoo_root() / name
    known = did_you_mean(name, names)
    raise StropError(f"no bundled model is called {quoted(name)} in {zoo_root()}; {known}")


def card(name: str) -> str:
    """The card of one bundled model: what it is, how it was made, and what it can do."""
    path = zoo_path(name) / "card.md"
    if not path.is_file():
        raise StropError(f"The bundled model {name!r} has no card.md in {path.parent}.")
    return path.read_text(encoding="utf-8")
