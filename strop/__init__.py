"""strop makes generative models smaller, faster and cheaper to serve, and shows what it cost."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Model", "Recipe", "StropError", "load"]

_HOMES = {
    "Model": "strop.model",
    "load": "strop.model",
    "Recipe": "strop.recipe",
    "StropError": "strop.core.errors",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that parts without torch stay without it."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in ("kv", "weights", "decode"):
        return import_module(f"strop.{name}")
    raise AttributeError(f"module 'strop' has no attribute {name!r}")
