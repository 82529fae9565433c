"""What the plug-in is told: `additional_config={"strop": {...}}` of vLLM."""

from dataclasses import dataclass
from typing import Any

from strop.core.errors import StropError, quoted
from strop.core.evict import ONLINE, Surroundings
from strop.core.evict.base import Evictor
from strop.core.evict.worth import RecomputeCost, Reuse
from strop.core.nodes import construct


@dataclass(frozen=True)
class Settings:
    """How blocks leave the cache, and whether what is left behind a hole is used."""

    evictor: str = "ghost"
    """A name of `strop.core.evict.ONLINE`; `ghost` finds out by itself which of the others pays."""
    lifespan: float = 600.0
    """Seconds within which blocks are mostly used again, for `asymcache` and `max-score`."""
    context: int = 30_000
    """Tokens of context that take as long to attend to as all else that a token costs; of an 8B Llama."""
    holes: bool = True
    """Whether cached blocks behind a missing one are used."""

    def __post_init__(self) -> None:
        if self.evictor not in ONLINE:
            known = ", ".join(sorted(ONLINE))
            raise StropError(f"strop.evictor must be one of {known}; got {quoted(self.evictor)}")
        if self.context < 1:
            raise StropError(f"strop.context is tokens, at least 1; got {self.context}")

    @classmethod
    def of(cls, additional_config: Any) -> "Settings":
        """From vLLM's `additional_config`. Raises StropError for unknown fields and wrong types."""
        told = additional_config.get("strop", {}) if isinstance(additional_config, dict) else {}
        return construct(cls, told, "strop", lambda *node: None)

    def make(self, capacity: int, block_size: int) -> Evictor:
        """The evictor for so many blocks of so many tokens; only the ratio of its costs matters."""
        cost = RecomputeCost.of(1.0, 1.0 / self.context, block_size)
        return ONLINE[self.evictor](Surroundings(capacity, cost, Reuse(self.lifespan)))
