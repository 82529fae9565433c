"""Which cached block goes when room is needed: one file an evictor, and their names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from strop.core.errors import StropError
from strop.core.evict.asymcache import AsymCache
from strop.core.evict.base import Evictor
from strop.core.evict.belady import Belady
from strop.core.evict.ghost import Ghost
from strop.core.evict.lru import LRU
from strop.core.evict.max_score import MaxScore
from strop.core.evict.pensieve import Pensieve
from strop.core.evict.worth import RecomputeCost, Reuse


@dataclass(frozen=True)
class Surroundings:
    """What an evictor may be told of the store that it is for."""

    capacity: int
    """Blocks of the store."""
    cost: RecomputeCost
    reuse: Reuse
    future: Sequence[tuple[float, Sequence[int]]] = ()
    """Time and blocks of every request to come, for the oracle."""


def _belady(around: Surroundings) -> Belady:
    if not around.future:
        raise StropError("belady evicts by what comes next: give it the trace, or choose another evictor")
    return Belady(around.cost, around.future)


ONLINE: dict[str, Callable[[Surroundings], Evictor]] = {
    "lru": lambda around: LRU(),
    "max-score": lambda around: MaxScore(around.reuse),
    "pensieve": lambda around: Pensieve(around.cost),
    "asymcache": lambda around: AsymCache(around.cost, around.reuse),
    "ghost": lambda around: Ghost(around.capacity, around.cost),
}
"""Those that know nothing of what is to come."""
EVICTORS = ONLINE | {"belady": _belady}
