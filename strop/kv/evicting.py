"""Methods that keep a bounded number of tokens: their fields, the storage, and when to evict.

Every KV head keeps its own K tokens: the newest `buffer`, and those of the others that the method scores
highest. Whenever `buffer` more have come, the lowest scored go (arXiv 2606.03928, section 2). Keys keep the
rotation of the position where they came.

Differs from the released code: survivors stay in order of time, so that smoothing pools neighbours in time;
rows may have different lengths; what the first forward pass brings, the prompt, is cut at the next one.

Not covered: speculation (an evicted token cannot come back), right padding, attention other than strop's.
"""

import itertools
from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig

from strop.core.attention import attend_dense, attend_plain, group_queries, ungroup
from strop.core.cache import AttendingLayer, KVCache, first_real, require
from strop.core.errors import StropError
from strop.kernels.evict import kernels
from strop.kv.base import KVMethod, KVShape


class Candidates(NamedTuple):
    """The tokens that an eviction chooses among, of rows that hold equally many."""

    keys: Tensor
    """`[B, H_kv, n, D]`, rotated to their positions."""
    values: Tensor
    """`[B, H_kv, n, D]`."""
    positions: Tensor
    """`[B, H_kv, n]` int32, ascending: how many tokens of the row came before."""
    queries: Tensor
    """`[B, H_q, W, D]`: the newest W queries, in no order."""
    scaling: float
    layer: int
    seen: int
    """Tokens of the row so far, which tells one eviction from the next."""


@dataclass(frozen=True, kw_only=True)
class EvictingKV(KVMethod):
    """A kv method that keeps `budget` tokens a KV head, and up to `buffer` more until they are evicted."""

    budget: int = 1024
    """Tokens kept by an eviction, the newest `buffer` included, K; a multiple of `buffer`."""
    buffer: int = 64
    """Newest tokens that are never evicted, and tokens between evictions, B."""

    window = 0
    """Newest queries that the scores ask for."""

    def __post_init__(self) -> None:
        if self.buffer < 1 or self.budget <= self.buffer:
            raise ValueError(
                f"budget ({self.budget}) must be above buffer ({self.buffer}), which is at least 1"
            )
        if self.budget % self.buffer:
            raise ValueError(f"budget ({self.budget}) must be a multiple of buffer ({self.buffer})")

    @abstractmethod
    def scores(self, candidates: Candidates) -> Tensor:
        """Which candidates to keep: the `budget - buffer` highest of `[B, H_kv, n]` float32.

        Of equals the newest stay.
        """

    def settings(self) -> str:
        return self.spell(str(self.budget), "budget")

    def new_cache(self, config: PretrainedConfig) -> KVCache:
        numbers = itertools.count()
        return KVCache(config, self, lambda decoder: EvictingLayer(decoder, self, next(numbers)))

    def slots(self, tokens: int) -> int:
        """Slots that a row of `tokens` tokens takes once what is due has been evicted."""
        return min(-(-tokens // self.buffer) * self.buffer, self.budget + self.buffer)

    def kv_bytes(self, shape: KVShape, tokens: int) -> int:
        slot = shape.token_bytes + 4 * shape.heads
        queries = self.window * shape.queries * shape.dim * shape.itemsize
        return shape.layers * (self.slots(tokens) * slot + queries) + shape.window_bytes(tokens)


class EvictingLayer(AttendingLayer):
    """One attention layer's cache: a slot a kept token, per row and KV head.

    `keys`, `values` `[B, H_kv, n, D]`, `positions` `[B, H_kv, n]` int32; of row b the slots before
    `length[b]` are taken, in order of time. `length` and `first` (column of the first real token), `[B]`,
    live on the host.
    """

    def __init__(self, config: PretrainedConfig, method: EvictingKV, number: int) -> None:
        super().__init__(config)
        self.method, self.number = method, number
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.columns = 0
        self.queries: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, _ = key_states.shape
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.positions = key_states.new_zeros(batch, heads, 0, dtype=torch.int32)
        self.length = torch.zeros(batch, dtype=torch.long)
        self.first = torch.zeros(batch, dtype=torch.long)
        self.is_initialized = True

    @property
    def seen(self) -> int:
        return self.columns

    def append(self, keys: Tensor, values: Tensor) -> None:
        if keys.dtype != self.keys.dtype:
            raise StropError(
                f"this cache holds {self.keys.dtype} and the model computes in {keys.dtype}: "
                "start from a new cache"
            )
        self.pending = keys, values
        self.columns += keys.shape[2]

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        before, (keys, values) = self.length, self.pending
        self.first = first_real(mask, self.first, self.columns)
        self._place(keys, values)
        del self.pending
        self._watch(query)
        out = self._attend(query, mask, scaling, softcap)
        due = (before > 0) & (self.length >= self.method.budget + self.method.buffer)
        if due.any():
            self._evict(due, scaling)
        return out

    # Placing.

    def _place(self, keys: Tensor, values: Tensor) -> None:
        """Give the newest tokens `[B, H_kv, q, D]` slots behind each row's own; pads get none."""
        batch, _, queries, _ = keys.shape
        fresh = (self.columns - self.first).clamp(max=queries)
        self._make_room(int((self.length + fresh).max()))
        seen = torch.arange(self.columns - queries, self.columns) - self.first[:, None]
        if self.level and int(fresh.min()) == queries:
            live = int(self.length[0])
            to, of = (slice(None), slice(None), slice(live, live + queries)), slice(None)
            positions = seen[:, None]
        else:
            rows = torch.arange(batch).repeat_interleave(fresh)
            nth = torch.arange(len(rows)) - (fresh.cumsum(0) - fresh)[rows]
            to, of = (
                (rows, slice(None), self.length[rows] + nth),
                (rows, slice(None), queries - fresh[rows] + nth),
            )
            positions = seen[rows, of[2]][:, None]
        self.keys[to], self.values[to] = keys[of], values[of]
        self.positions[to] = positions.to(self.positions)
        self.length = self.length + fresh

    @property
    def level(self) -> bool:
        """Whether all rows hold equally many tokens."""
        return bool((self.length == self.length[0]).all())

    def _make_room(self, slots: int) -> None:
        """Grow to so many slots, in whole buffers: up to `budget + buffer`, beyond for a longer prompt."""
        held = self.keys.shape[2]
        if slots > held:
            room = -(-slots // self.method.buffer) * self.method.buffer - held
            self.keys, self.values = (pad(x, (0, 0, 0, room)) for x in (self.keys, self.values))
            self.positions = pad(self.positions, (0, room))

    def _watch(self, query: Tensor) -> None:
        """Keep the newest `window` queries, in a ring."""
        window = self.method.window
        if not window:
            return
        if self.queries is None:
            batch, heads, _, dim = query.shape
            self.queries = query.new_zeros(batch, heads, window, dim)
        newest = query[:, :, -window:].detach()
        ring = torch.arange(self.columns - newest.shape[2], self.columns, device=query.device) % window
        self.queries.index_copy_(2, ring, newest)

    # Attention.

    def _attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        live = int(self.length.max())
        keys, values = self.keys[:, :, :live], self.values[:, :, :live]
        visible = self._visible(mask, query, implied=softcap is None)
        if softcap is None:
            return attend_plain(query, keys, values, visible, scaling)
        rows = group_queries(query, keys.shape[1])
        return ungroup(attend_dense(rows, keys, values, visible, scaling, softcap).out, query)

    def _visible(self, mask: Tensor | None, query: Tensor, implied: bool) -> Tensor | None:
        """Which query may read which slot, `[B, 1 or H_q, q, n]`.

        None where a single query sees all, or, if that is `implied`, where a whole prompt is causal.
        """
        queries, live = query.shape[2], int(self.length.max())
        if mask is not None and queries == 1 and int(mask.sum()) == mask.shape[1] * self._real():
            mask = None
        prompt = implied and queries == self.columns
        if mask is None and self.level and (queries == 1 or prompt):
            return None
        device = self.keys.device
        own = (torch.arange(live) < self.length[:, None]).to(device)[:, None, None]
        if mask is None and queries == 1:
            return own
        columns = self.positions[:, :, :live] + self.first.to(device)[:, None, None]
        columns = columns.repeat_interleave(query.shape[1] // columns.shape[1], 1).long()[:, :, None]
        if mask is None:
            newest = torch.arange(self.columns - queries, self.columns, device=device)
            return (columns <= newest[:, None]) & own
        index = columns.clamp(max=self.columns - 1).expand(-1, -1, queries, -1)
        return mask.expand(len(columns), query.shape[1], -1, -1).gather(-1, index) & own

    def _real(self) -> int:
        """Tokens of all rows so far, pads left out."""
        return int((self.columns - self.first).sum())

    # Eviction.

    def _evict(self, due: Tensor, scaling: float) -> None:
        """Cut the due rows to `budget` tokens, rows of equal length and age together."""
        kinds = torch.stack([self.length, self.columns - self.first], 1)
        for kind in kinds[due].unique(dim=0):
            rows = (due & (kinds == kind).all(1)).nonzero().flatten()
            self._cut(rows, *kind.tolist(), scaling)
        self.length = torch.where(due, self.method.budget, self.length)
        room = self.method.budget + self.method.buffer
        if int(self.length.max()) <= room < self.keys.shape[2]:
            self.keys, self.values = (x[:, :, :room].clone() for x in (self.keys, self.values))
            self.positions = self.positions[:, :, :room].clone()

    def _cut(self, rows: Tensor, live: int, seen: int, scaling: float) -> None:
        """Evict from rows that hold `live` tokens of `seen`."""
        whole = len(rows) == len(self.length)
        pick = slice(None) if whole else rows.to(self.keys.device)
        stored = [x[pick] for x in (self.keys, self.values, self.positions)]
        old = slice(None, live - self.method.buffer)
        queries = None if self.queries is None else self.queries[pick]
        candidates = Candidates(*(x[:, :, old] for x in stored), queries, scaling, self.number, seen)
        if candidates.keys.isnan().any() or candidates.values.isnan().any():
            raise StropError(
                "keys or values of this model are not numbers (NaN), so no token can be chosen to stay: "
                "check its weights with `strop doctor`, or run it in float32"
            )
        scores = self.method.scores(candidates)
        kernel = kernels(scores.device.type)
        kept = kernel.keep_top(scores, self.method.budget - self.method.buffer)
        lengths = torch.full((len(rows),), live, device=scores.device)
        for held in (stored[0], stored[1], stored[2][..., None]):
            kernel.gather(held, kept, lengths, self.method.buffer)
        if not whole:
            for x, held in zip((self.keys, self.values, self.positions), stored, strict=True):
                x[pick] = held

    # What the cache contract asks for besides.

    def dense(self) -> tuple[Tensor, Tensor]:
        """Refused: which tokens stay is decided by head, and only strop's attention keeps their positions."""
        raise StropError(
            "a cache that evicts tokens works with strop's attention alone: call strop.kv.attach(model) first"
        )

    def settle(self) -> None:
        """Nothing waits: an eviction happens in the step that makes it due."""

    def crop(self, tokens: int) -> None:
        """Refuse to take tokens back, for some may have been evicted to make room for them."""
        if tokens and tokens != self.columns:
            raise StropError("a cache that evicts tokens cannot take any back: use it without speculation")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self.length)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        here, host = indices.to(self.keys.device), indices.cpu()
        self.keys, self.values = self.keys[here], self.values[here]
        self.positions = self.positions[here]
        self.length, self.first = self.length[host], self.first[host]
        if self.queries is not None:
            self.queries = self.queries[here]

    def check(self) -> None:
        if not self.is_initialized:
            return
        live, positions = self.length, self.positions.cpu()
        require(self.keys.shape == self.values.shape, "keys and values of different shapes")
        require(positions.shape == self.keys.shape[:3], "slots without a position")
        require((live >= 0).all() and (live <= self.keys.shape[2]).all(), "more tokens than slots")
        for row, held in enumerate(live.tolist()):
            taken, seen = positions[row, :, :held], self.columns - int(self.first[row])
            require(held <= max(seen, 0), "more tokens than came")
            require((taken[:, 1:] > taken[:, :-1]).all(), "a token twice, or out of order")
            recent = torch.arange(seen - min(held, self.method.buffer), seen)
            require((taken[:, held - len(recent) :] == recent).all(), "a row without its newest tokens")

    def state(self) -> dict[str, Tensor]:
        queries = {} if self.queries is None else {"queries": self.queries}
        names = ("keys", "values", "positions", "length", "first")
        return (
            {name: getattr(self, name) for name in names} | queries | {"columns": torch.tensor(self.columns)}
        )

    def restore(self, state: dict[str, Tensor]) -> None:
        self.lazy_initialization(state["keys"], state["values"])
        self.keys, self.values, self.positions = (state[name] for name in ("keys", "values", "positions"))
        self.length, self.first = state["length"].cpu(), state["first"].cpu()
        self.queries, self.columns = state.get("queries"), int(state["columns"])
