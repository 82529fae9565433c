"""Where evicting methods keep their tokens: a slot each, per row and KV head, ragged over the batch.

Survivors of an eviction move to the front in order of time, and new tokens go behind them. Keys keep the
rotation of the position where they came, which is held beside them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from strop.core.attention import attend_dense, attend_plain, group_queries, ungroup
from strop.core.cache import require
from strop.kernels.evict import kernels


class SlotStore:
    """Keys and values of one layer.

    `keys`, `values` `[B, H_kv, n, D]`, `positions` `[B, H_kv, n]` int32 (tokens of the row that came before);
    of row b the slots before `length[b]` are taken, in order of time. `length` and `first` (column of the
    first real token), `[B]`, live on the host, as does `columns`, the columns of the padded batch so far.
    """

    def __init__(self, budget: int, buffer: int, keys: Tensor, values: Tensor) -> None:
        """An empty store for tokens like `keys` and `values`; `budget` and `buffer` as in `EvictingKV`."""
        batch, heads, _, _ = keys.shape
        self.budget, self.buffer, self.period = budget, buffer, buffer
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        self.positions = keys.new_zeros(batch, heads, 0, dtype=torch.int32)
        self.length = torch.zeros(batch, dtype=torch.long)
        self.first = torch.zeros(batch, dtype=torch.long)
        self.columns = 0

    @property
    def seen(self) -> Tensor:
        """Tokens of each row so far, pads left out, `[B]`."""
        return self.columns - self.first

    @property
    def held(self) -> Tensor:
        """Tokens of each row that are still there, `[B]`."""
        return self.length

    @property
    def room(self) -> int:
        """Slots that a row takes from its first eviction on."""
        return self.budget + self.period

    @property
    def due(self) -> Tensor:
        """Which rows hold so many tokens that some have to go, `[B]`."""
        return self.held >= self.budget + self.period

    def place(self, keys: Tensor, values: Tensor) -> None:
        """Give the newest columns' tokens `[B, H_kv, q, D]` slots behind each row's own; pads get none."""
        batch, _, queries, _ = keys.shape
        fresh = self.seen.clamp(max=queries)
        self._grow(int((self.length + fresh).max()))
        came = torch.arange(self.columns - queries, self.columns) - self.first[:, None]
        if self._level() and int(fresh.min()) == queries:
            end = int(self.length[0])
            slots, tokens = (slice(None), slice(None), slice(end, end + queries)), slice(None)
            came = came[:, None]
        else:
            rows = torch.arange(batch).repeat_interleave(fresh)
            nth = torch.arange(len(rows)) - (fresh.cumsum(0) - fresh)[rows]
            slots = rows, slice(None), self.length[rows] + nth
            tokens = rows, slice(None), (queries - fresh)[rows] + nth
            came = came[rows, tokens[2]][:, None]
        self.keys[slots], self.values[slots] = keys[tokens], values[tokens]
        self.positions[slots] = came.to(self.positions)
        self.length = self.length + fresh

    def _level(self) -> bool:
        """Whether all rows take equally many slots."""
        return bool((self.length == self.length[0]).all())

    def _taken(self, end: int) -> Tensor:
        """Which of the first `end` slots each row takes, `[B, end]` bool."""
        return torch.arange(end) < self.length[:, None]

    @torch.inference_mode(False)
    def _grow(self, slots: int) -> None:
        """Make room for so many slots, in steps of a buffer."""
        if slots > (now := self.keys.shape[2]):
            more = -(-slots // self.buffer) * self.buffer - now
            self.keys, self.values = (pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
            self.positions = pad(self.positions, (0, more))

    # Attention.

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        """Attention over all slots, in the terms of `AttendingLayer.attend`."""
        end = int(self.length.max())
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        visible = self.visible(query, self.plain(query, mask), softcap)
        if softcap is None:
            return attend_plain(query, keys, values, visible, scaling)
        rows = group_queries(query, keys.shape[1])
        return ungroup(attend_dense(rows, keys, values, visible, scaling, softcap).out, query)

    def plain(self, query: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask, or None where it hides only pads from a single query."""
        if (
            mask is not None
            and query.shape[2] == 1
            and int(mask.sum()) == mask.shape[1] * int(self.seen.sum())
        ):
            return None
        return mask

    def visible(self, query: Tensor, mask: Tensor | None, softcap: float | None) -> Tensor | None:
        """Which query may read which slot, `[B, 1 or H_q, q, n]`; None where `attend_plain` needs no mask."""
        queries, end = query.shape[2], int(self.length.max())
        prompt = queries == self.columns and softcap is None
        if mask is None and self._level() and (queries == 1 or prompt):
            return None
        own = self._taken(end).to(self.keys.device)[:, None, None]
        if mask is None and queries == 1:
            return own
        alike = slice(1) if (self.held == self.seen).all() else slice(None)
        return self.seen_by(query, mask, self.positions[:, alike, :end]) & own

    def seen_by(self, query: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """Which query sees the tokens at `positions` `[B, 1 or H_kv, n]`: `[B, 1 or H_q, q, n]`."""
        queries, device = query.shape[2], positions.device
        columns = (positions.long() + self.first.to(device)[:, None, None])[:, :, None]
        if columns.shape[1] > 1 or (mask is not None and mask.shape[1] > 1):
            columns = columns.repeat_interleave(query.shape[1] // columns.shape[1], 1)
        if mask is None:
            return columns <= torch.arange(self.columns - queries, self.columns, device=device)[:, None]
        index = columns.clamp(max=self.columns - 1).expand(-1, -1, queries, -1)
        return mask.expand(len(columns), columns.shape[1], -1, -1).gather(-1, index)

    # Eviction.

    def candidates(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values `[b, H_kv, n, D]` and positions of equally long `rows`, their newest left out."""
        pick, end = self._pick(rows), int(self.length[rows[0]]) - self.buffer
        keys, values, positions = (x[pick][:, :, :end] for x in (self.keys, self.values, self.positions))
        return keys, values, positions

    def keep(self, rows: Tensor, scores: Tensor) -> None:
        """Keep the candidates of `rows` that `scores` `[b, H_kv, n]` highest, with the newest behind them.

        Of equals the newer stays.
        """
        count = self.budget - self.buffer
        kernel, pick = kernels(scores.device.type), self._pick(rows)
        kept = kernel.keep_top(scores, count)
        lengths = self.length[rows].to(scores.device)
        for x in (self.keys, self.values, self.positions[..., None]):
            stored = x[pick]
            kernel.gather(stored, kept, lengths, self.buffer)
            if stored.data_ptr() != x.data_ptr():
                x[pick] = stored
        self.length = self.length.index_fill(0, rows, self.budget)
        self._shrink()

    def _pick(self, rows: Tensor) -> slice | Tensor:
        """An index of `rows` that makes a view where it can."""
        return slice(None) if len(rows) == len(self.length) else rows.to(self.keys.device)

    @torch.inference_mode(False)
    def _shrink(self) -> None:
        """Give back what only a long prompt needed."""
        if int(self.length.max()) <= self.room < self.keys.shape[2]:
            self.keys, self.values = (x[:, :, : self.room].clone() for x in (self.keys, self.values))
            self.positions = self.positions[:, :, : self.room].clone()

    # The batch, and files.

    @torch.inference_mode(False)
    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may repeat."""
        here, host = rows.to(self.keys.device), rows.cpu()
        self.keys, self.values, self.positions = (x[here] for x in (self.keys, self.values, self.positions))
        self.length, self.first = self.length[host], self.first[host]

    def check(self) -> None:
        """Raise ValueError unless every row holds tokens that came, in order, the newest among them."""
        batch, heads, slots, _ = self.keys.shape
        require(self.keys.shape == self.values.shape, "keys and values of different shapes")
        require(self.positions.shape == (batch, heads, slots), "slots without a position")
        require(self.keys.dtype == self.values.dtype, "keys and values of different dtypes")
        require(self.positions.dtype == torch.int32, "positions that are no integers")
        require(self.length.shape == self.first.shape == (batch,), "rows without a length")
        require(self.length.dtype == self.first.dtype == torch.long, "lengths that are no integers")
        require(
            (self.first >= 0).all() and (self.first <= self.columns).all(), "rows that start out of range"
        )
        require((self.length >= 0).all() and (self.length <= slots).all(), "more tokens than slots")
        require((self.held <= self.seen).all(), "more tokens than came")
        for row, taken in enumerate(self.tokens()):
            came = int(self.seen[row])
            recent = torch.arange(came - min(taken.shape[1], self.buffer), came)
            require((taken >= 0).all() and (taken[:, 1:] > taken[:, :-1]).all(), "a token twice")
            require((taken[:, taken.shape[1] - len(recent) :] == recent).all(), "a row without its newest")

    def tokens(self) -> Sequence[Tensor]:
        """For each row the tokens that it still holds, `[H_kv, n]` ascending positions on the host."""
        positions = self.positions.cpu()
        return [positions[row, :, :end] for row, end in enumerate(self.length.tolist())]

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs, by name."""
        names = ("keys", "values", "positions", "length", "first")
        return {name: getattr(self, name) for name in names} | {"columns": torch.tensor(self.columns)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Hold what another store's `state` says."""
        self.keys, self.values, self.positions = (state[name] for name in ("keys", "values", "positions"))
        self.length, self.first = state["length"].cpu(), state["first"].cpu()
        self.columns = int(state["columns"])
