"""How often documents are found in a pool of limited size, by what names them; no model is needed.

Documents are all of one size and drawn by Zipf's law. Named alone (LazyAttention) one entry serves every
place; a copy for each place (Block-Attention) can be made from any other, but takes room beside it; a prefix
is named by all that stands before it.
"""

from collections.abc import Sequence

import numpy as np

from strop.core.blocks import KVStore
from strop.core.evict.lru import LRU

LAZY, COPIES, PREFIX = WAYS = "lazy", "copies", "prefix"


def zipf(documents: int, alpha: float) -> np.ndarray:
    """Chances `[N]`."""
    weights = np.arange(1.0, documents + 1) ** -alpha
    return weights / weights.sum()


def requests(documents: int, alpha: float, read: int, count: int, seed: int) -> np.ndarray:
    """Documents of each request `[count, read]`, no two alike, drawn one after another by Zipf's law."""
    rng = np.random.default_rng(seed)
    noise = rng.exponential(size=(count, documents)) / zipf(documents, alpha)
    return np.argsort(noise, axis=1)[:, :read]


def replayed(way: str, capacity: int, asked: np.ndarray) -> float:
    """Share of documents found in a pool of `capacity` documents under LRU."""
    store, hits = KVStore(capacity, LRU()), 0
    places = asked.shape[1]
    for now, row in enumerate(asked.tolist()):
        chains = _chains(way, row)
        for place, (document, chain) in enumerate(zip(row, chains, strict=True)):
            if way == COPIES:
                hits += any(document * places + other in store for other in range(places))
            elif way == LAZY:
                hits += chain[0] in store
            else:
                hits += all(block in store for block in chain[: place + 1])
        held = chains[-1:] if way == PREFIX else chains
        for chain in held:
            if not store.acquire(chain, 0, float(now)):
                raise RuntimeError("control failed: a request alone does not fit the pool")
        for chain in held:
            store.release(chain, 0, float(now))
    store.check()
    return hits / asked.size


def _chains(way: str, row: Sequence[int]) -> list[list[int]]:
    """For each document the names that it needs in order."""
    if way == LAZY:
        return [[document] for document in row]
    if way == COPIES:
        return [[document * len(row) + place] for place, document in enumerate(row)]
    names = [hash(tuple(row[: place + 1])) for place in range(len(row))]
    return [names[: place + 1] for place in range(len(row))]


def static(documents: int, alpha: float, capacity: int, places: int, draws: int, seed: int) -> float:
    """Share of single look-ups that a store holding the likeliest documents has, at each of `places`."""
    kept = capacity // places
    store = KVStore(max(kept * places, 1), LRU())
    for name in range(kept * places):
        store.acquire([name], 0, 0.0)
    rng = np.random.default_rng(seed)
    document = rng.choice(documents, size=draws, p=zipf(documents, alpha))
    names = document * places + rng.integers(places, size=draws)
    return float(np.mean([name in store for name in names.tolist()]))


def foreseen(documents: int, alpha: float, capacity: int, places: int) -> float:
    """The paper's equation for it."""
    return float(zipf(documents, alpha)[: capacity // places].sum())
