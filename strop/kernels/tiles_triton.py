"""Packed tiles on a GPU, in Triton: attention that never decodes a tile, in three launches.

The queries are rotated; then programs attend over parts of the context side by side, some of tiles and some
of plain tokens; then the parts are joined. Queries are columns here, the narrow operand.

A byte holds neighbours of a tile's row, so a tile is used in lanes: all first codes of the bytes, all second
ones, and so on, each a matrix that is bytes masked where they lie. Codes feed the tensor cores from there,
and no code moves between threads; what belongs to rows or columns is addressed in lanes as well.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from strop.core.hadamard import hadamard, rotate
from strop.kernels.encode_triton import encode
from strop.kernels.record_triton import load_scales, sides
from strop.kernels.tiles import TileForm

__all__ = ["attend", "encode", "supports"]

PROGRAMS = 2048
"""Programs of attention that fill a large GPU about three times."""
MOST_PARTS = 80
"""Parts of a row's tiles, or of its plain tokens, at most: one program joins them all."""
PLAIN_BLOCK = tl.constexpr(32)
"""Plain tokens read at a time; a part has four times as many."""

LOWEST = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)


def supports(form: TileForm) -> bool:
    """Whether a tile measures a power of two both ways, feeds tensor cores (16), and fits in registers."""
    lengths = (form.dim, form.group, *(side.width for side in sides(form)))
    return all(x >= 16 and x & (x - 1) == 0 for x in lengths) and form.dim * form.group <= 2**15


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    own: Tensor | None,
    records: Tensor,
    table: Tensor,
    form: TileForm,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Attention of the newest tokens over plain tokens and packed tiles: see `Kernels.attend`."""
    (batch, heads, queries, dim), heads_kv = query.shape, keys.shape[1]
    pairs, height = batch * heads_kv, heads // heads_kv * queries
    width = min(max(triton.next_power_of_2(height), 8), 32)
    blocks = triton.cdiv(height, width)
    most = min(triton.cdiv(PROGRAMS, pairs * blocks), MOST_PARTS)
    tiles = table.shape[1] if len(records) else 0
    of_tiles = min(tiles, most)
    parts = of_tiles + min(triton.cdiv(keys.shape[2], 4 * PLAIN_BLOCK.value), most)
    if keys.stride() != values.stride() or keys.stride(3) != 1:
        keys, values = keys.contiguous(), values.contiguous()
    turned = rotate(query.float()) if form.rotation else query.float()
    outs, sums = turned.new_empty(pairs, parts, height, dim), turned.new_empty(pairs, parts, height)
    _attend_parts[pairs, parts, blocks](
        query.contiguous(), turned.contiguous(), keys, values, own, records, table, outs, sums,
        scaling, softcap, heads_kv, height, queries, keys.shape[2], tiles, of_tiles, *keys.stride()[:3],
        *sides(form), WIDTH=width, OPERAND=tl.float32 if query.dtype == torch.float32 else tl.float16,
        num_warps=2 if width == 8 and form.dim * form.group <= 2**14 else 4,
    )  # fmt: skip
    out = query.new_empty(batch, queries, heads, dim)
    _join_parts[pairs * height,](
        outs, sums, hadamard(dim, query.device), out, heads_kv, height, queries, parts, of_tiles,
        PARTS=triton.next_power_of_2(parts), DIM=dim, ROTATION=form.rotation, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("height", "queries", "tokens", "tiles", "of_tiles"))
def _attend_parts(
    query, turned, keys, values, own, records, table, outs, sums,
    scaling, softcap, heads_kv, height, queries, tokens, tiles, of_tiles, step_b, step_h, step_n,
    KEYS: tl.constexpr, VALUES: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Program (pair, part, block): a row's KV head, a part of its context, `WIDTH` of its `height` queries.

    Writes each query's output over the part `[D]` and log2 of the sum of its weights. Parts before `of_tiles`
    share the row's tiles among them, the rest share the plain tokens.
    """
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = pair // heads_kv, pair % heads_kv
    index = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    at = (pair * height + index)[None, :] * KEYS.rows + tl.arange(0, KEYS.rows)[:, None]
    result = (pair * tl.num_programs(1) + part) * height + index
    real = index < height
    if part < of_tiles:
        packed = _over_tiles(
            tl.load(turned + at, mask=real[None, :], other=0.0), records + head * KEYS.form.record_bytes,
            heads_kv * KEYS.form.record_bytes, table + batch * tiles,
            part * tiles // of_tiles, (part + 1) * tiles // of_tiles, scaling, softcap, KEYS, VALUES, OPERAND,
        )  # fmt: skip
        _store_part(outs, sums, result, real, packed, KEYS.rows, VALUES.lanes)
    else:
        of_plain, part = tl.num_programs(1) - of_tiles, part - of_tiles
        blocks, start = tl.cdiv(tokens, PLAIN_BLOCK), batch * step_b + head * step_h
        if own is not None:
            own += batch * tokens
        plain = _over_plain(
            tl.load(query + at, mask=real[None, :], other=0.0), keys + start, values + start, own, step_n,
            part * blocks // of_plain, (part + 1) * blocks // of_plain, tokens,
            tokens - queries + index % queries, scaling, softcap,
        )  # fmt: skip
        _store_part(outs, sums, result, real, plain, KEYS.rows, 1)


@triton.jit
def _store_part(outs, sums, at, real, found, DIM: tl.constexpr, LANES: tl.constexpr):
    """Write a part's output, divided by the sum of its weights, and its log-sum-exp."""
    top, total, out = found
    total = tl.where(total > 0, total, 1.0)
    tl.store(sums + at, top + tl.log2(total), mask=real)
    for lane in tl.static_range(LANES):
        channel = lane + tl.arange(0, DIM // LANES) * LANES
        tl.store(outs + at[None, :] * DIM + channel[:, None], out[lane] / total[None, :], mask=real[None, :])


@triton.jit
def _over_tiles(
    queries, records, step, table, first, last, scaling, softcap,
    KEYS: tl.constexpr, VALUES: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Attention of rotated queries `[D, W]` over a row's tiles from `first` to `last`.

    Returns the largest logit `[W]`, the sum of weights `[W]`, and the output before division in lanes.
    """
    held = last * 0
    for start in range(first, last, 64):
        entry = start + tl.arange(0, 64)
        held += tl.sum((tl.load(table + entry, mask=entry < last, other=-1) >= 0).to(tl.int32), 0)
    peak = tl.maximum(tl.max(tl.abs(queries), 0), 1e-30)
    queries, scaling = queries / peak[None, :], scaling * peak[None, :]
    LANES_K: tl.constexpr = KEYS.lanes
    LANES_V: tl.constexpr = VALUES.lanes
    top, total, out = peak * 0 + LOWEST, _zeros(KEYS, peak.shape[0])[0], _zeros(VALUES, peak.shape[0])
    for index in range(first, first + held):
        record = records + tl.load(table + index) * step
        scores, highest = _weigh((queries,), record, KEYS, 1, OPERAND), total + LOWEST
        logits = ()
        for lane in tl.static_range(LANES_K):
            logits += (_logits(scores[lane], scaling, softcap),)
            highest = tl.maximum(highest, logits[lane])
        new_top = tl.maximum(top, tl.max(highest, 0))
        kept = tl.exp2(top - new_top)[None, :]
        weights, total, top = (), total * kept, new_top
        for lane in tl.static_range(LANES_K):
            weights += (tl.exp2(logits[lane] - top[None, :]),)
            total += weights[lane]
        new, old = _weigh(weights, record, VALUES, LANES_K, OPERAND), out
        out = ()
        for lane in tl.static_range(LANES_V):
            out += (old[lane] * kept + new[lane],)
    return top, tl.sum(total, 0), out


@triton.jit
def _zeros(SIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Zeros for the columns of every lane."""
    LANES: tl.constexpr = SIDE.lanes
    HEIGHT: tl.constexpr = SIDE.width
    lanes = ()
    for _ in tl.static_range(LANES):
        lanes += (tl.zeros((HEIGHT, WIDTH), tl.float32),)
    return lanes


@triton.jit
def _weigh(rows, record, SIDE: tl.constexpr, PARTS: tl.constexpr, OPERAND: tl.constexpr):
    """`tile.T @ rows`, the scales folded into rows and result: `strop.kv.codec.Tile.weigh` on small `rows`.

    `rows` come in parts, every `PARTS`-th `[R / PARTS, W]`, and are at most 1; the result comes in lanes. A
    masked byte is taken for the last bits of an fp16 number: that is the code, 2**24 times smaller, exactly.
    """
    LANES: tl.constexpr = SIDE.lanes
    sums, base = _zeros(SIDE, rows[0].shape[1]), rows[0] * 0
    for part in tl.static_range(PARTS):
        index = part + tl.arange(0, SIDE.rows // PARTS) * PARTS
        scale = load_scales(record + SIDE.at.scale, index, SIDE.rows, SIDE.form.fp8)
        zero = load_scales(record + SIDE.at.zero, index, SIDE.rows, False)
        at = index[None, :] * SIDE.width + tl.arange(0, SIDE.width)[:, None]
        packed = tl.load(record + SIDE.at.codes + at).to(tl.int16)
        folded = (rows[part] * scale[:, None]).to(OPERAND)
        base += rows[part] * zero[:, None]
        before = sums
        sums = ()
        for lane in tl.static_range(LANES):
            codes = packed & ((2**SIDE.bits - 1) << lane * SIDE.bits)
            codes = codes.to(tl.float16, bitcast=True).to(OPERAND)
            sums += (tl.dot(codes, folded, before[lane], input_precision="tf32x3"),)
    base = tl.sum(base, 0)[None, :]
    out = ()
    for lane in tl.static_range(LANES):
        weighed = sums[lane] * 2.0 ** (24 - lane * SIDE.bits) + base
        if SIDE.form.balanced:
            column = lane + tl.arange(0, SIDE.width) * SIDE.lanes
            weighed *= load_scales(record + SIDE.at.column, column, SIDE.columns, SIDE.form.fp8)[:, None]
        out += (weighed,)
    return out


@triton.jit
def _over_plain(queries, keys, values, own, step, first, last, tokens, newest, scaling, softcap):
    """Attention of queries `[D, W]` over blocks of plain tokens, up to `newest` `[W]`: as `_over_tiles`."""
    channel = tl.arange(0, queries.shape[0])
    total = tl.sum(queries.to(tl.float32), 0) * 0
    top, out = total + LOWEST, queries.to(tl.float32) * 0
    for block in range(first, last):
        token = block * PLAIN_BLOCK + tl.arange(0, PLAIN_BLOCK)
        held = token < tokens
        key = tl.load(keys + token[:, None] * step + channel[None, :], mask=held[:, None], other=0.0)
        value = tl.load(values + token[None, :] * step + channel[:, None], mask=held[None, :], other=0.0)
        if own is not None:
            held = held & (tl.load(own + token, mask=held, other=0) != 0)
        seen = held[:, None] & (token[:, None] <= newest[None, :])
        logits = _logits(tl.dot(key, queries, input_precision="tf32x3"), scaling, softcap)
        logits = tl.where(seen, logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, 0))
        weights, kept = tl.exp2(logits - new_top[None, :]), tl.exp2(top - new_top)
        out = out * kept[None, :] + tl.dot(value, weights.to(value.dtype), input_precision="tf32x3")
        top, total = new_top, total * kept + tl.sum(weights, 0)
    return top, total, (out,)


@triton.jit
def _logits(scores, scaling, softcap):
    """Logits to base 2."""
    scores *= scaling
    if softcap is not None:
        scores = softcap * (1 - 2 / (tl.exp(scores * (2 / softcap)) + 1))
    return scores * LOG2_E


@triton.jit(do_not_specialize=("height", "queries", "parts", "of_tiles"))
def _join_parts(
    outs, sums, hadamard, out, heads_kv, height, queries, parts, of_tiles,
    PARTS: tl.constexpr, DIM: tl.constexpr, ROTATION: tl.constexpr,
):  # fmt: skip
    """One softmax over all parts for one query of one pair, the tiles' output turned back by `hadamard`."""
    pair, row = tl.program_id(0).to(tl.int64) // height, tl.program_id(0) % height
    part, channel = tl.arange(0, PARTS), tl.arange(0, DIM)
    at = (pair * parts + part) * height + row
    logits = tl.load(sums + at, mask=part < parts, other=-float("inf"))
    weights = tl.exp2(logits - tl.max(logits, 0))
    weights /= tl.sum(weights, 0)
    share = tl.load(outs + at[:, None] * DIM + channel[None, :], mask=(part < parts)[:, None], other=0.0)
    share *= weights[:, None]
    of_tile = (part < of_tiles)[:, None]
    tiles, plain = tl.sum(tl.where(of_tile, share, 0.0), 0), tl.sum(tl.where(of_tile, 0.0, share), 0)
    if ROTATION:
        tiles = tl.sum(tiles[:, None] * tl.load(hadamard + channel[:, None] * DIM + channel[None, :]), 0)
    groups = height // queries
    head = pair % heads_kv * groups + row // queries
    token = pair // heads_kv * queries + row % queries
    tl.store(out + (token * heads_kv * groups + head) * DIM + channel, tiles + plain)
