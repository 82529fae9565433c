"""Evictors on Mooncake's conversation trace against an independent implementation of the same replay."""

from functools import cache

import pytest

from strop.claims.asymcache_bed import cost, reused
from strop.core.blocks import KVStore
from strop.core.evict.asymcache import AsymCache
from strop.core.evict.lru import LRU
from strop.core.evict.worth import Reuse
from strop.serve.base import Trace
from strop.serve.cache_replay import replay
from strop.serve.traces import load
from strop.serve.traces.read import data_root

BLOCKS = (2000, 8000, 16_000)
KNOWN = {
    "lru": (0.961, 0.841, 0.760),
    "asymcache p=0.99": (0.954, 0.910, 0.866),
    "asymcache p=0.9": (0.951, 0.899, 0.851),
    "asymcache p=0.5": (0.944, 0.883, 0.824),
    "asymcache p=0.99 without holes": (0.973, 0.971, 0.962),
    "asymcache p=0.1, L at P90": (0.934, 0.848, 0.755),
}
"""Seconds of prefill over those without a cache, at 0.216 ms a token and 7.1 ns a token of context."""


@cache
def conversation() -> Trace:
    root = data_root()
    path = root / "mooncake" / "conversation_trace.jsonl" if root else None
    if path is None or not path.is_file():
        pytest.skip("Mooncake's conversation trace is not here: STROP_DATA names its folder")
    return load(path)


@cache
def lifespan(quantile: float) -> float:
    return reused(conversation(), quantile).L


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", KNOWN)
def test_recomputed_seconds_are_those_of_another_implementation(name, blocks):
    trace = conversation()
    worth = cost(trace)
    evictor = LRU()
    if name != "lru":
        p = float(name.removeprefix("asymcache p=").split(" ")[0].rstrip(","))
        evictor = AsymCache(worth, Reuse(lifespan(0.9 if "P90" in name else 0.99), p), adapt=False)
    found = replay(trace, KVStore(blocks, evictor), worth, holes=name != "lru" and "without" not in name)
    assert found.recomputed == pytest.approx(KNOWN[name][BLOCKS.index(blocks)], abs=0.002)
