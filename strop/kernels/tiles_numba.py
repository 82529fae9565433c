"""Tile kernels for CPUs, in numba: attention over packed tiles here, packing in `encode_numba`.

`attend` does a layer's whole step in one call: it rotates the query, scores packed tiles on their raw codes
with the scales folded into the query, scores plain tokens, takes one softmax over all, and does the same for
values (arXiv 2606.03458, appendix A). A tile is unpacked once for all query rows that share its KV head.

A unit of work is a row of the batch, a KV head, and a run of its places; `merge` joins the runs.
"""

import math

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from strop.core.attention import LOWEST, Partial, merge
from strop.kernels.encode_numba import encode
from strop.kernels.record_numba import (
    as_array,
    from_half,
    highest,
    jit,
    kernel,
    load_halves,
    load_scales,
    rotate,
    share,
    turn,
    workers,
)
from strop.kernels.tiles import TileForm

__all__ = ["attend", "encode", "supports"]

LOG2_E = np.float32(np.log2(np.e))
EXP2 = tuple(np.float32(math.log(2) ** n / math.factorial(n)) for n in range(8))
"""Taylor's 2^x, lowest power first: exact to fp32 within half a unit of 0."""
BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""As what `_widen` reads numbers of 16 bits."""
ALL = np.empty((0, 0), np.bool_)
"""Stands for "every plain token"."""
BLOCK = 8
"""Rows of a tile that are summed at a time."""


def supports(form: TileForm) -> bool:
    """Whether rows fill whole bytes and blocks."""
    return form.dim % BLOCK == 0 and form.group % BLOCK == 0


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
    """Attention of the newest tokens over plain tokens and packed tiles, as `Kernels` says."""
    (batch, heads, plain, dim), (of_query, queries) = keys.shape, query.shape[1:3]
    threads = workers(batch * of_query * queries * (plain + form.group * table.shape[1]) * dim)
    runs = -(-threads // (batch * heads))
    given = (
        _numbers(query),
        _numbers(keys),
        _numbers(values),
        ALL if own is None else own.numpy(),
        records.numpy(),
        table.numpy(),
        as_array(form),
        np.float32(scaling),
        np.float32(softcap or 0),
    )
    shape = runs, batch, queries, of_query
    made = np.empty((*shape, dim), np.float32), np.empty(shape, np.float32)
    share(lambda first, last: _attend(*given, first, last, *made), runs * batch * heads, threads)
    if runs == 1:
        return torch.from_numpy(made[0][0]).to(query.dtype)
    parts = [Partial(*map(torch.from_numpy, part)) for part in zip(*made, strict=True)]
    return merge(parts).out.to(query.dtype)


def _numbers(x: Tensor) -> np.ndarray:
    """A tensor's numbers as `_widen` reads them."""
    bits = BITS.get(x.dtype)
    return (x if bits is None else x.view(bits)).contiguous().numpy()


@kernel
def _attend(query, keys, values, own, records, table, forms, scaling, softcap, first, last, out, lse):
    """Units `first` to `last` of `out` `[runs, B, q, H_q, D]` and `lse` `[runs, B, q, H_q]`."""
    runs, batch, queries, of_query, dim = out.shape
    heads, plain = keys.shape[1:3]
    groups = of_query // heads
    rows = np.empty((groups * queries, dim), np.float32)
    sums, tops = np.empty_like(rows), np.empty(len(rows), np.float32)
    for unit in range(first, last):
        run, row, head = unit // (batch * heads), unit // heads % batch, unit % heads
        for n in range(len(rows)):
            for d in range(dim):
                rows[n, d] = _widen(query[row, head * groups + n // queries, n % queries, d]) * scaling
                sums[n, d] = 0
        count = 0
        while count < table.shape[1] and table[row, count] >= 0:
            count += 1
        tiles = table[row, count * run // runs : count * (run + 1) // runs]
        start, stop = plain * run // runs, plain * (run + 1) // runs
        read = own[row, start:stop] if len(own) else np.ones(stop - start, np.bool_)
        k, v, early = keys[row, head, start:stop], values[row, head, start:stop], plain - queries - start
        _attend_unit(rows, k, v, read, early, queries, records, tiles, head, forms[0], softcap, sums, tops)
        for n in range(len(rows)):
            lse[run, row, n % queries, head * groups + n // queries] = tops[n]
            for d in range(dim):
                out[run, row, n % queries, head * groups + n // queries, d] = sums[n, d]


@jit
def _attend_unit(query, keys, values, own, early, queries, records, tiles, head, form, softcap, out, lse):
    """Attention of scaled `query` `[R, D]` over plain tokens `[n, D]` and tiles, into `out` and `lse`."""
    rows, dim = query.shape
    group, packed = form.group, len(tiles) * form.group
    weights = np.zeros((rows, packed + len(keys)), np.float32)
    _score(query, keys, weights, packed)
    if form.rotation:
        _rotate(query)
    _weigh_tiles(query, dim, records, tiles, head, form, form.keys, form.bits_k, weights, group)
    if softcap > 0:
        for n in range(rows):
            for t in range(weights.shape[1]):
                weights[n, t] = softcap * np.tanh(weights[n, t] / softcap)
    _hide(weights, packed, own, early, queries)
    total = np.empty(rows, np.float32)
    for n in range(rows):
        total[n], lse[n] = _soften(weights[n])
    _weigh_tiles(weights, group, records, tiles, head, form, form.values, form.bits_v, out, dim)
    if form.rotation:
        _rotate(out)
    _weigh(weights, packed, values, out)
    for n in range(rows):
        for d in range(dim):
            out[n, d] /= total[n]


@jit
def _weigh(weights, at, rows, out):
    """Add `weights[:, at:] @ rows` to `out`: `[n, at + R]`, `[R, C]` codes or numbers, `[n, C]`."""
    blocks = len(rows) // BLOCK * BLOCK
    for r in range(0, blocks, BLOCK):
        for n in range(len(weights)):
            w, o = weights[n, at + r : at + r + BLOCK], out[n]
            w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
            for c in range(rows.shape[1]):
                part = w0 * _widen(rows[r, c]) + w1 * _widen(rows[r + 1, c])
                part += w2 * _widen(rows[r + 2, c]) + w3 * _widen(rows[r + 3, c])
                part += w4 * _widen(rows[r + 4, c]) + w5 * _widen(rows[r + 5, c])
                o[c] += part + w6 * _widen(rows[r + 6, c]) + w7 * _widen(rows[r + 7, c])
    for r in range(blocks, len(rows)):
        for n in range(len(weights)):
            for c in range(rows.shape[1]):
                out[n, c] += weights[n, at + r] * _widen(rows[r, c])


@jit
def _weigh_tiles(weights, rows, records, tiles, head, form, at, bits, out, columns):
    """Add `weights @ tile` to `out` for every tile: `[n, R]` by `[R, C]` to `[n, C]`.

    The weights and the sums of one tile follow those of another, where their array is wide enough.
    """
    scale, zero, column = np.empty(rows, np.float32), np.empty(rows, np.float32), np.ones(columns, np.float32)
    codes, size = np.empty((rows, columns), np.uint8), rows * columns * bits // 8
    scaled, sums = np.empty((len(weights), rows), np.float32), np.empty((len(weights), columns), np.float32)
    for i in range(len(tiles)):
        record = records[tiles[i], head]
        source, target = i * rows % weights.shape[1], i * columns % out.shape[1]
        load_scales(record, at.scale, form.fp8, scale)
        load_halves(record, at.zero, zero)
        if form.balanced:
            load_scales(record, at.column, form.fp8, column)
        _unpack(record[at.codes : at.codes + size], bits, codes.reshape(-1))
        for n in range(len(weights)):
            given, line = weights[n, source : source + rows], scaled[n]
            for r in range(rows):
                line[r] = given[r] * scale[r]
            offset = _dot(given, zero)
            for c in range(columns):
                sums[n, c] = offset
        _weigh(scaled, 0, codes, sums)
        for n in range(len(weights)):
            line, total = sums[n], out[n, target : target + columns]
            for c in range(columns):
                total[c] += line[c] * column[c]


@jit
def _score(query, keys, scores, at):
    """Scores of plain `keys` `[m, D]` for `query` `[n, D]`, into `scores` `[n, at:]`."""
    for t in range(len(keys)):
        for n in range(len(query)):
            scores[n, at + t] = _dot(query[n], keys[t])


@jit
def _dot(x, y):
    """x . y; its loop stores nothing, or where things lie would decide the order of the sum."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * _widen(y[i])
    return total


@jit
def _hide(scores, at, own, early, queries):
    """Hide the plain tokens that a row does not own, or that came after a query."""
    for t in range(len(own)):
        unread = max(t - early, 0) if own[t] else queries
        if unread:
            for n in range(len(scores)):
                if n % queries < unread:
                    scores[n, at + t] = -np.inf


@jit
def _soften(scores):
    """Turn scores `[n]` into weights; returns their sum and the log-sum-exp of the scores."""
    top, total = max(highest(scores), np.float32(LOWEST)), np.float32(0)
    for t in range(len(scores)):
        scores[t] = _exp(scores[t] - top)
        total += scores[t]
    total = max(total, np.float32(1))
    return total, top + np.log(total)


@jit
def _unpack(data, bits, out):
    """Codes of packed bytes, one a byte, by the halving of `strop.core.bits.unpack`."""
    if bits == 8:
        for i in range(len(data)):
            out[i] = data[i]
    elif bits == 4:
        pairs = out.view(np.uint16)
        for i in range(len(data)):
            x = np.uint16(data[i])
            pairs[i] = (x | x << np.uint16(4)) & np.uint16(0x0F0F)
    elif bits == 2:
        fours = out.view(np.uint32)
        for i in range(len(data)):
            x = np.uint32(data[i])
            x = (x | x << np.uint32(12)) & np.uint32(0x000F000F)
            fours[i] = (x | x << np.uint32(6)) & np.uint32(0x03030303)
    else:
        eights = out.view(np.uint64)
        for i in range(len(data)):
            x = np.uint64(data[i])
            x = (x | x << np.uint64(28)) & np.uint64(0x0000000F0000000F)
            x = (x | x << np.uint64(14)) & np.uint64(0x0003000300030003)
            eights[i] = (x | x << np.uint64(7)) & np.uint64(0x0101010101010101)


@jit
def _rotate(x):
    """Rotate the rows of `x` in place."""
    turned = np.empty((x.shape[1], len(x)), np.float32)
    turn(x, turned)
    rotate(turned)
    turn(turned, x)


# Numbers.


def _widen(x):  # type: ignore[no-untyped-def]
    """A code, or a number in fp32, bf16 (bits in a uint16) or fp16 (bits in an int16), as fp32."""
    raise NotImplementedError


@overload(_widen)
def _widening(x):  # type: ignore[no-untyped-def]
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    if x == types.int16:
        return lambda x: from_half(np.uint16(x))
    return lambda x: np.float32(x)


@jit
def _exp(x):
    """e^x for x <= 0, to 5e-7 of it above e^-10; vectorises, which the library does not."""
    x = max(x * LOG2_E, np.float32(-126))
    whole = np.floor(x + np.float32(0.5))
    part, power = np.float32(x - whole), EXP2[-1]
    for degree in range(len(EXP2) - 2, -1, -1):
        power = power * part + EXP2[degree]
    return power * np.uint32((np.int32(whole) + 127) << 23).view(np.float32)
