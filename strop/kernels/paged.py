"""Attention of packed rows over paged keys and values, each page at the position where its reader has it.

One function serves decoding, chunked prefill, prefill of several pieces (AsymCache's multi-segment attention,
arXiv 2606.02964, 4.1) and pages rotated for another position (LazyAttention, arXiv 2606.04302, 3), all in one
batch. What differs is only the plan: which pages a request reads, where they start, how many of their slots
count, by how much their keys are to be turned. `attend` here is plain torch and serves every device;
`paged_triton` and `paged_flex` have the same function.

Keys are never turned in place: here and in Triton's decoding queries are turned back, once a section.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from strop.core.attention import LOWEST, Partial, cap, partial_attention
from strop.core.rope import Rope, turned

TILE = 64
"""Slots that a kernel reads at a time; the sections of a plan are whole tiles."""
FEW, MANY = 64, 128
"""Rows of a request that a kernel of prefill takes at a time: where no request has more, and otherwise."""


class Section(NamedTuple):
    """Entries `first` up to `last` of a request that share a shift."""

    turn: int
    """Which row of the plan's angles."""
    first: int
    last: int


class Span(NamedTuple):
    """The rows of one request, `first` up to `first + count`, and what they read."""

    first: int
    count: int
    sections: tuple[Section, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which packed rows read which slots: row i of request r reads slot s of entry e if s < valid[r, e] and
    starts[r, e] + s <= positions[i]."""

    page: int
    """Slots of a page."""
    rope: Rope
    cos: Tensor
    """Angles of each shift `[U, D]` float32, see `Rope.angles`; the first is no shift."""
    sin: Tensor
    positions: Tensor
    """Of each row `[N]` int32; ascending within a request, whose rows are neighbours."""
    pages: Tensor
    """`[R, E]` int32, as are the next three; ascending in `starts`. Padding has no valid slots."""
    starts: Tensor
    valid: Tensor
    turns: Tensor
    """Rows of the angles; one for all entries of a tile."""
    spans: tuple[Span, ...]
    """A request each, on the host."""
    decodes: Tensor
    """Requests of one row `[K, 3]` int32: request, row, tiles to read."""
    height: int
    """Most rows of a block."""
    blocks: Tensor
    """Blocks of rows of the other requests `[B, 4]` int32: request, first row, rows, tiles to read: no key
    behind them is in reach of the block's last row."""

    @classmethod
    def of(
        cls,
        requests: Sequence[tuple[np.ndarray, np.ndarray]],
        page: int,
        rope: Rope,
        device: torch.device | str = "cpu",
    ) -> "Plan":
        """From each request's positions `[n]` and entries `[e, 4]`, both ascending.

        An entry is where its page lies in the pool, the position of its first slot, how many slots count, and
        by how much its keys are to be turned: that position less the one for which they were rotated.
        """
        shifts = np.unique(np.concatenate([entries[:, 3] for _, entries in requests]))
        shifts = np.concatenate([[0], shifts[shifts != 0]])
        aligned = [_aligned(entries, max(TILE // page, 1)) for _, entries in requests]
        table = np.zeros((4, len(requests), max(map(len, aligned))), dtype=np.int32)
        spans, decodes, blocks, row = [], [], [], 0
        height = MANY if max(len(positions) for positions, _ in requests) > FEW else FEW
        for request, ((positions, _), entries) in enumerate(zip(requests, aligned, strict=True)):
            turned_by = np.where(entries[:, 3] == 0, 0, np.searchsorted(shifts[1:], entries[:, 3]) + 1)
            table[:3, request, : len(entries)] = entries[:, :3].T
            table[3, request, : len(entries)] = turned_by
            spans.append(Span(row, len(positions), _sections(turned_by)))
            last = np.minimum(np.arange(height, len(positions) + height, height), len(positions))
            tiles = -(-np.searchsorted(entries[:, 1], positions[last - 1], side="right") * page // TILE)
            if len(positions) == 1:
                decodes.append((request, row, tiles[0]))
            else:
                first = np.arange(0, len(positions), height)
                blocks += zip([request] * len(first), row + first, last - first, tiles, strict=True)
            row += len(positions)
        cos, sin = rope.angles(torch.from_numpy(shifts))
        flat = torch.from_numpy(np.concatenate([positions for positions, _ in requests])).int()
        pages, starts, valid, turns = torch.from_numpy(table).to(device)
        return cls(
            page=page,
            rope=rope,
            cos=cos.to(device),
            sin=sin.to(device),
            positions=flat.to(device),
            pages=pages,
            starts=starts,
            valid=valid,
            turns=turns,
            spans=tuple(spans),
            decodes=_int32(decodes, 3).to(device),
            height=height,
            blocks=_int32(blocks, 4).to(device),
        )

    @cached_property
    def sees(self) -> tuple[Tensor, ...]:
        """Which rows of each request see which slots of its entries `[n, E * page]` bool."""
        positions, counts = slots(self)
        return tuple(
            counts[request] & (positions[request] <= self.positions[first : first + count, None])
            for request, (first, count, _) in enumerate(self.spans)
        )


Attend = Callable[[Tensor, Tensor, Tensor, Plan, float, "float | None"], Partial]
"""`attend`, in any of its realisations."""


@lru_cache(maxsize=8)
def kernel(device_type: str) -> Attend:
    """The `attend` for a device type: Triton's on a GPU that has it, else this file's."""
    if device_type == "cuda" and find_spec("triton") is not None:
        return import_module("strop.kernels.paged_triton").attend
    return sys.modules[__name__].attend


def attend(
    query: Tensor, keys: Tensor, values: Tensor, plan: Plan, scaling: float, softcap: float | None
) -> Partial:
    """Attention of packed rows `query` `[N, H_q, D]` over pools `keys`, `values` `[P, H_kv, page, D]`.

    Returns the output `[N, H_q, D]` and the log-sum-exp `[N, H_q]` in float32 (float64 for float64); 0 and
    `LOWEST` for a row that sees nothing. What lies in slots that do not count is never read.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros(query.shape, dtype=wide, device=query.device)
    lse = torch.full(query.shape[:2], LOWEST, dtype=wide, device=query.device)
    for request, span in enumerate(plan.spans):
        rows = slice(span.first, span.first + span.count)
        if span.sections:
            out[rows], lse[rows] = _one(query[rows].to(wide), keys, values, plan, request, scaling, softcap)
    return Partial(out, lse)


def _one(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: Plan,
    request: int,
    scaling: float,
    softcap: float | None,
) -> Partial:
    """Attention of one request's rows `[n, H_q, D]`: scores by section, one softmax over all."""
    span, (_, heads, dim) = plan.spans[request], query.shape
    pages = plan.pages[request, : span.sections[-1].last].long()
    key, value = (_side_by_side(pool[pages]).to(query.dtype) for pool in (keys, values))
    sees = plan.sees[request][:, : key.shape[1]]
    value = value.masked_fill(~sees.any(0)[:, None], 0.0)
    scores = []
    for section in span.sections:
        at = slice(section.first * plan.page, section.last * plan.page)
        rows = turn_back(query, plan, section.turn).transpose(0, 1).reshape(len(key), -1, dim)
        scores.append(cap(rows @ key[:, at].transpose(-1, -2) * scaling, softcap))
    found = partial_attention(torch.cat(scores, -1)[None], sees[None, None], lambda weights: weights @ value)
    return Partial(*(ungrouped(x, heads) for x in found))


def ungrouped(rows: Tensor, heads: int) -> Tensor:
    """Rows of KV heads `[1, H_kv, R, ...]` as packed rows `[n, H_q, ...]`, where R = H_q / H_kv * n."""
    return rows.reshape(heads, -1, *rows.shape[3:]).transpose(0, 1)


def turn_back(query: Tensor, plan: Plan, turn: int) -> Tensor:
    """Queries `[..., D]` as a section's keys want them; always from the queries as they came."""
    if turn == 0:
        return query
    cos, sin = (angles[turn].to(query.dtype) for angles in (plan.cos, plan.sin))
    return turned(query, cos, -sin, plan.rope.partner)


def slots(plan: Plan) -> tuple[Tensor, Tensor]:
    """Position of each slot of each request's entries, and whether it counts: `[R, E * page]` each."""
    slot = torch.arange(plan.page, device=plan.starts.device)
    position = plan.starts[..., None] + slot
    return position.flatten(1), (slot < plan.valid[..., None]).flatten(1)


def _side_by_side(pages: Tensor) -> Tensor:
    """Pages `[E, H_kv, page, D]` as slots `[H_kv, E * page, D]`."""
    return pages.transpose(0, 1).flatten(1, 2)


def _aligned(entries: np.ndarray, tile: int) -> np.ndarray:
    """The entries, each run of one shift filled up to whole tiles of so many entries."""
    filled = []
    for run in np.split(entries, np.flatnonzero(np.diff(entries[:, 3])) + 1):
        filling = np.repeat(run[-1:], -len(run) % tile, 0)
        filling[:, 2] = 0
        filled += [run, filling]
    return np.concatenate(filled)


def _sections(turns: np.ndarray) -> tuple[Section, ...]:
    """The runs of one turn."""
    if not len(turns):
        return ()
    edges = [0, *(np.flatnonzero(np.diff(turns)) + 1).tolist(), len(turns)]
    return tuple(Section(int(turns[first]), first, last) for first, last in pairwise(edges))


def _int32(rows: Sequence[tuple[int, ...]], width: int) -> Tensor:
    return torch.tensor(np.array(rows, dtype=np.int32).reshape(-1, width))
