"""The KV store under random operations, its holes and pins, and the index that all stores share."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.core.blocks import KVStore, PrefixIndex, Run
from strop.core.errors import StropError
from strop.core.evict import EVICTORS, Surroundings
from strop.core.evict.base import Evictor
from strop.core.evict.lru import LRU
from strop.core.evict.worth import RecomputeCost, Reuse

AROUND = Surroundings(12, RecomputeCost(1.0, 0.1), Reuse(5.0, 0.5), [(0.0, (0,))])


def chain(path: list[int]) -> tuple[int, ...]:
    """Hashes of a sequence: the same for the same path so far, others otherwise."""
    hashes = [0]
    for step in path:
        hashes.append(hashes[-1] * 3 + step + 1)
    return tuple(hashes[1:])


PATHS = st.lists(st.integers(0, 1), max_size=7)
STEPS = st.lists(
    st.tuples(st.sampled_from(["acquire", "release", "pin", "unpin"]), PATHS, st.integers(0, 3)), max_size=40
)


def stored(store: KVStore) -> tuple:
    """All that a failed acquisition must leave as it was."""
    resident = [block in store for block in range(3280)]
    return store.used, store.cached, store.anonymous, sorted(store.pinned), resident


@pytest.mark.parametrize("name", EVICTORS)
@given(steps=STEPS)
@settings(max_examples=40, deadline=None)
def test_counts_hold_whatever_is_asked_in_whatever_order(name, steps):
    index = PrefixIndex(3)
    store = KVStore(12, EVICTORS[name](AROUND), index, 1)
    held: list[tuple[tuple[int, ...], int]] = []
    for moment, (what, path, number) in enumerate(steps):
        now, blocks = float(moment // 2), chain(path)
        if what == "acquire":
            before = stored(store)
            if store.acquire(blocks, number, now):
                held.append((blocks, number))
                assert store.hits(blocks) == len(blocks)
            else:
                others = {block for blocks, _ in held for block in blocks}
                assert len(others.union(blocks)) + sum(count for _, count in held) + number > 12
                assert stored(store) == before or store.pinned.keys() != set(before[3])
        elif what == "release" and held:
            store.release(*held.pop(number % len(held)), now)
        elif what == "pin":
            store.pin(number, blocks, now + number, now)
        elif what == "unpin":
            store.unpin(number, now)
        store.check()
        assert all(block in store for blocks, _ in held for block in blocks)
        assert store.used >= len({block for blocks, _ in held for block in blocks})
        assert index.hits(blocks).tolist() == [0, store.hits(blocks), 0]
    for blocks, number in held:
        store.release(blocks, number, 100.0)
    for session in range(4):
        store.unpin(session, 100.0)
    store.check()
    assert store.used == 0


@given(
    owned=st.lists(st.tuples(st.integers(0, 69), PATHS), max_size=30),
    gone=st.lists(st.tuples(st.integers(0, 69), PATHS), max_size=10),
    asked=PATHS,
)
@settings(max_examples=100, deadline=None)
def test_the_index_tells_what_a_walk_through_each_store_tells(owned, gone, asked):
    index, stores = PrefixIndex(70), [set() for _ in range(70)]
    for place, path in owned:
        new = [block for block in chain(path) if block not in stores[place]]
        index.add(new, place)
        stores[place].update(new)
    for place, path in gone:
        old = [block for block in chain(path)[1:] if block in stores[place]]
        index.remove(old, place)
        stores[place].difference_update(old)
    blocks = chain(asked)
    expected = [next((n for n, b in enumerate(blocks) if b not in one), len(blocks)) for one in stores]
    assert index.hits(blocks).tolist() == expected


def test_the_tail_of_what_was_freed_first_goes_first():
    store = KVStore(6, LRU())
    for now, blocks in enumerate([(1, 2, 3), (4, 5, 6)]):
        assert store.acquire(blocks, 0, now)
        store.release(blocks, 0, now)
    assert store.acquire((7, 8), 0, 2.0)
    assert [block for block in range(1, 7) if block not in store] == [2, 3]
    assert store.hits((1, 2, 3)) == 1


def test_a_hole_is_seen_and_what_lies_behind_it_is_kept():
    class Middle(Evictor):
        def __init__(self):
            self.blocks = []

        def on_ref_zero(self, block, index, now):
            self.blocks.append((abs(index - 1), block))

        def on_hit(self, block, now):
            self.blocks = [entry for entry in self.blocks if entry[1] != block]

        def victim(self, now):
            self.blocks.sort()
            return self.blocks.pop(0)[1]

        def __len__(self):
            return len(self.blocks)

    store, blocks = KVStore(5, Middle()), (1, 2, 3, 4, 5)
    assert store.match(blocks) == [Run(0, 5, False)]
    assert store.acquire(blocks, 0, 0.0)
    store.release(blocks, 0, 0.0)
    assert store.acquire((), 1, 1.0)
    assert store.match(blocks) == [Run(0, 1, True), Run(1, 2, False), Run(2, 5, True)]
    assert store.hits(blocks) == 1
    store.release((), 1, 1.0)
    assert store.acquire(blocks, 0, 2.0)
    assert store.match(blocks) == [Run(0, 5, True)]
    assert store.match(()) == []


def test_what_a_sequence_finds_is_no_victim_of_its_own():
    store = KVStore(4, LRU())
    assert store.acquire((1, 2, 3, 4), 0, 0.0)
    store.release((1, 2, 3, 4), 0, 0.0)
    assert store.acquire((1, 2, 5, 6), 0, 1.0)
    assert store.hits((1, 2, 5, 6)) == 4
    store.check()


def test_shared_blocks_stay_until_the_last_one_lets_go():
    store = KVStore(4, LRU())
    assert store.acquire((1, 2), 0, 0.0)
    assert store.acquire((1, 2, 3), 1, 0.0)
    assert (store.used, store.free) == (4, 0)
    store.release((1, 2), 0, 1.0)
    assert not store.acquire((4,), 0, 1.0)
    store.release((1, 2, 3), 1, 2.0)
    assert (store.used, store.free, store.cached) == (0, 4, 3)


def test_pins_outlive_pressure_on_what_is_cached_and_end_in_time():
    store = KVStore(6, LRU())
    assert store.acquire((1, 2, 3), 0, 0.0)
    assert store.pin(7, (1, 2, 3), 10.0, 0.0) == 3
    store.release((1, 2, 3), 0, 0.0)
    for now in range(1, 5):
        assert store.acquire((10 * now, 10 * now + 1, 10 * now + 2), 0, now)
        store.release((10 * now, 10 * now + 1, 10 * now + 2), 0, now)
    assert store.hits((1, 2, 3)) == 3
    assert store.acquire((50, 51, 52), 0, 10.0)
    store.release((50, 51, 52), 0, 10.0)
    assert not store.pinned
    assert store.acquire((60, 61, 62), 0, 11.0)
    assert store.hits((1, 2, 3)) == 0


def test_pins_yield_the_newest_first_to_a_sequence_without_other_room():
    store = KVStore(6, LRU())
    for session, blocks in enumerate([(1, 2), (3, 4), (5, 6)]):
        assert store.acquire(blocks, 0, 0.0)
        store.pin(session, blocks, 100.0, 0.0)
        store.release(blocks, 0, 0.0)
    assert store.acquire((7, 8, 9), 0, 1.0)
    assert list(store.pinned) == [0]
    assert store.hits((1, 2)) == 2
    assert not store.acquire((10, 11, 12, 13), 0, 1.0)
    assert list(store.pinned) == [0]


def test_a_pin_holds_nothing_behind_a_hole_and_replaces_the_one_before():
    store = KVStore(6, LRU())
    assert store.acquire((1, 2), 0, 0.0)
    store.release((1, 2), 0, 0.0)
    assert store.pin(0, (1, 2, 3), 5.0, 0.0) == 2
    assert store.pin(0, (1,), 5.0, 0.0) == 1
    assert (store.used, store.cached) == (1, 1)
    store.unpin(0, 1.0)
    store.unpin(0, 1.0)
    assert (store.used, store.cached) == (0, 2)


def test_thousands_of_pins_may_end_at_once():
    store = KVStore(3000, LRU())
    for session in range(3000):
        assert store.acquire((session,), 0, 0.0)
        store.pin(session, (session,), 5.0, 0.0)
        store.release((session,), 0, 0.0)
    assert store.acquire(tuple(range(5000, 8000)), 0, 5.0)
    store.check()
    assert not store.pinned


def test_a_store_without_room_is_refused():
    with pytest.raises(StropError, match="at least 1"):
        KVStore(0, LRU())


def test_hits_of_all_stores_are_an_array_of_integers():
    hits = PrefixIndex(2).hits(())
    assert hits.dtype == np.int64
    assert hits.shape == (2,)


def test_stores_and_evictors_load_no_tensor_library():
    code = (
        "from strop.core import blocks, chunks, evict; from strop.serve import cache_replay, pinning\n"
        "import sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
