"""`strop.kernels.paged.attend` on a GPU, in Triton: one kernel for rows that decode, one for blocks of rows.

Decoding turns its query back when a section begins, always from the query as it came, and shares a request's
tiles among programs; prefill turns each tile of keys forward once, in registers, for its block of rows
(LazyAttention, arXiv 2606.04302, 3.2). A block stops at the last tile in reach of its last row, whatever
pieces its rows come from (AsymCache, arXiv 2606.02964, 4.1).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from strop.core import attention
from strop.core.attention import Partial
from strop.kernels.paged import TILE, Plan

PROGRAMS = 1024
"""Programs of decoding that fill a large GPU."""
MOST_PARTS = 64
"""Parts of a request's tiles at most: one program joins them all."""

LOWEST = tl.constexpr(attention.LOWEST)
FLOOR = tl.constexpr(-1e30)
"""Where the largest logit begins: below any, and less by a number is still finite."""
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, plan: Plan, scaling: float, softcap: float | None
) -> Partial:
    """Attention of packed rows over paged keys and values: see `strop.kernels.paged.attend`."""
    (_, heads, dim), heads_kv = query.shape, keys.shape[1]
    query = query.contiguous()
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    table = (plan.pages, plan.starts, plan.valid, plan.turns, plan.cos, plan.sin, plan.positions)
    sizes = (scaling * LOG2_E.value, softcap, heads_kv, heads // heads_kv, plan.pages.shape[1], dim)
    shape = {
        "PAGE": plan.page, "SIZE": TILE, "DIM": max(triton.next_power_of_2(dim), 16),
        "HALF": len(plan.rope.frequencies), "INTERLEAVED": plan.rope.interleaved,
    }  # fmt: skip
    if blocks := len(plan.blocks):
        _prefill[blocks, heads](
            query, keys, values, *table, plan.blocks, out, lse, *sizes, **shape, ROWS=plan.height,
            num_warps=8 if plan.height > 64 or dim > 128 else 4,
        )  # fmt: skip
    if count := len(plan.decodes):
        most = min(triton.cdiv(PROGRAMS, count * heads_kv), MOST_PARTS)
        parts = max(min(most, plan.pages.shape[1] * plan.page // TILE), 1)
        outs, sums = out.new_empty(count, heads, parts, dim), out.new_empty(count, heads, parts)
        _decode[count, heads_kv, parts](
            query, keys, values, *table, plan.decodes, outs, sums, *sizes, **shape,
            WIDTH=max(triton.next_power_of_2(heads // heads_kv), 16),
        )  # fmt: skip
        _join[count, heads](
            outs, sums, plan.decodes, out, lse, parts, dim,
            PARTS=triton.next_power_of_2(parts), DIM=shape["DIM"],
        )  # fmt: skip
    return Partial(out, lse)


@triton.jit(do_not_specialize=("width",))
def _decode(
    query, keys, values, pages, starts, valid, turns, cos, sin, positions, decodes, outs, sums,
    scaling, softcap, heads_kv, groups, width, dim,
    PAGE: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (request, KV head, part): the query heads of a KV head over a part of the request's tiles."""
    index, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts = tl.num_programs(2)
    request, row = tl.load(decodes + 3 * index), tl.load(decodes + 3 * index + 1)
    tiles = tl.load(decodes + 3 * index + 2)
    group, channel = tl.arange(0, WIDTH), tl.arange(0, DIM)
    real = (group < groups)[:, None] & (channel < dim)[None, :]
    line = (row.to(tl.int64) * heads_kv + head) * groups + group
    at = line[:, None] * dim
    full = tl.load(query + at + channel[None, :], mask=real, other=0.0)
    other = tl.load(query + at + _partner(channel, HALF, INTERLEAVED)[None, :], mask=real, other=0.0)
    position, table = tl.load(positions + row), request.to(tl.int64) * width
    rows, now = full, part * 0
    top, total = tl.zeros((WIDTH,), tl.float32) + FLOOR, tl.zeros((WIDTH,), tl.float32)
    out = tl.zeros((WIDTH, DIM), tl.float32)
    for tile in range(part * tiles // parts, (part + 1) * tiles // parts):
        turn = tl.load(turns + table + tile * SIZE // PAGE)
        if turn != now:
            turned = full * _angles(cos, turn, channel, dim)[None, :]
            turned -= other * _angles(sin, turn, channel, dim)[None, :]
            rows, now = turned.to(full.dtype), turn
        page, slot, where, counts = _slots(pages + table, starts + table, valid + table, tile, PAGE, SIZE)
        seen = counts & (where <= position)
        start = ((page * heads_kv + head) * PAGE + slot) * dim
        held = (channel < dim)[:, None] & seen[None, :]
        key = tl.load(keys + start[None, :] + channel[:, None], mask=held, other=0.0)
        value = tl.load(values + start[:, None] + channel[None, :], mask=tl.trans(held), other=0.0)
        logits = _logits(tl.dot(rows, key, input_precision="tf32x3"), scaling, softcap)
        logits = tl.where(seen[None, :], logits, -float("inf"))
        top, total, out = _online(logits, value, top, total, out)
    at = ((index * heads_kv + head) * groups + group) * parts + part
    tl.store(sums + at, _lse(top, total), mask=group < groups)
    total = tl.where(total > 0, total, 1.0)
    tl.store(outs + at[:, None] * dim + channel[None, :], out / total[:, None], mask=real)


@triton.jit(do_not_specialize=("width",))
def _prefill(
    query, keys, values, pages, starts, valid, turns, cos, sin, positions, blocks, outs, sums,
    scaling, softcap, heads_kv, groups, width, dim,
    PAGE: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (block, query head): a block of a request's rows over the tiles in reach of its last row."""
    index, head = tl.program_id(0), tl.program_id(1)
    request, first = tl.load(blocks + 4 * index), tl.load(blocks + 4 * index + 1)
    count, tiles = tl.load(blocks + 4 * index + 2), tl.load(blocks + 4 * index + 3)
    step, channel = tl.arange(0, ROWS), tl.arange(0, DIM)
    partner = _partner(channel, HALF, INTERLEAVED)
    real = (step < count)[:, None] & (channel < dim)[None, :]
    at = (first + step).to(tl.int64) * heads_kv * groups + head
    rows = tl.load(query + at[:, None] * dim + channel[None, :], mask=real, other=0.0)
    position = tl.load(positions + first + step, mask=step < count, other=-1)
    newest, table = tl.max(position, 0), request.to(tl.int64) * width
    top, total = tl.zeros((ROWS,), tl.float32) + FLOOR, tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, DIM), tl.float32)
    for tile in range(0, tiles):
        turn = tl.load(turns + table + tile * SIZE // PAGE)
        page, slot, where, counts = _slots(pages + table, starts + table, valid + table, tile, PAGE, SIZE)
        counts = counts & (where <= newest)
        line = ((page * heads_kv + head // groups) * PAGE + slot) * dim
        held = (channel < dim)[:, None] & counts[None, :]
        key = tl.load(keys + line[None, :] + channel[:, None], mask=held, other=0.0)
        value = tl.load(values + line[:, None] + channel[None, :], mask=tl.trans(held), other=0.0)
        if turn != 0:
            other = tl.load(keys + line[None, :] + partner[:, None], mask=held, other=0.0)
            turned = key * _angles(cos, turn, channel, dim)[:, None]
            turned += other * _angles(sin, turn, channel, dim)[:, None]
            key = turned.to(key.dtype)
        logits = _logits(tl.dot(rows, key, input_precision="tf32x3"), scaling, softcap)
        seen = counts[None, :] & (where[None, :] <= position[:, None])
        logits = tl.where(seen, logits, -float("inf"))
        top, total, out = _online(logits, value, top, total, out)
    tl.store(sums + at, _lse(top, total), mask=step < count)
    total = tl.where(total > 0, total, 1.0)
    tl.store(outs + at[:, None] * dim + channel[None, :], out / total[:, None], mask=real)


@triton.jit
def _join(outs, sums, decodes, out, lse, parts, dim, PARTS: tl.constexpr, DIM: tl.constexpr):
    """Program (request, query head): one softmax over the parts of a decoded row."""
    index, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    part, channel = tl.arange(0, PARTS), tl.arange(0, DIM)
    at = (index * heads + head) * parts + part
    held = part < parts
    logits = tl.load(sums + at, mask=held, other=LOWEST)
    top = tl.max(logits, 0)
    weights = tl.where(held, tl.exp(logits - top), 0.0)
    total = tl.sum(weights, 0)
    real = held[:, None] & (channel < dim)[None, :]
    share = tl.load(outs + at[:, None] * dim + channel[None, :], mask=real, other=0.0)
    to = tl.load(decodes + 3 * index + 1).to(tl.int64) * heads + head
    tl.store(out + to * dim + channel, tl.sum(share * weights[:, None], 0) / total, mask=channel < dim)
    tl.store(lse + to, tl.where(top > FLOOR, top + tl.log(total), LOWEST))


@triton.jit
def _slots(pages, starts, valid, tile, PAGE: tl.constexpr, SIZE: tl.constexpr):
    """Of a tile's slots: the page, the slot in it, the position, and whether it counts, `[SIZE]` each."""
    index = tile * SIZE + tl.arange(0, SIZE)
    entry, slot = index // PAGE, index % PAGE
    page = tl.load(pages + entry).to(tl.int64)
    return page, slot, tl.load(starts + entry) + slot, slot < tl.load(valid + entry)


@triton.jit
def _partner(channel, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The channel that each turns with, as `Rope.partner`."""
    split = tl.where(channel < HALF, channel + HALF, channel - HALF)
    return tl.where(channel < 2 * HALF, channel ^ 1 if INTERLEAVED else split, channel)


@triton.jit
def _angles(table, turn, channel, dim):
    """A row of the plan's angles `[DIM]`."""
    return tl.load(table + turn * dim + channel, mask=channel < dim, other=0.0)


@triton.jit
def _logits(scores, scaling, softcap):
    """Logits to base 2; `scaling` carries the base already."""
    scores *= scaling
    if softcap is not None:
        softcap *= LOG2_E
        scores = softcap * (1 - 2 / (tl.exp2(scores * (2 * LOG2_E / softcap)) + 1))
    return scores


@triton.jit
def _online(logits, value, top, total, out):
    """Take a tile `[R, SIZE]` with its values `[SIZE, DIM]` into an online softmax."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    weights, kept = tl.exp2(logits - new_top[:, None]), tl.exp2(top - new_top)
    out = out * kept[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="tf32x3")
    return new_top, total * kept + tl.sum(weights, 1), out


@triton.jit
def _lse(top, total):
    """Natural log of the sum of a row's weights; `LOWEST` for a row that saw nothing."""
    return tl.where(total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) * LN_2, LOWEST)
