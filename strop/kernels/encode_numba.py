"""Packing tiles on a CPU, in numba: rotate, balance, round by rows, as `strop.kv.codec` does in torch.

A tile is at hand twice, as it lies and turned, so that rows and columns are walked alike.
"""

import numpy as np
import torch
from torch import Tensor

from strop.kernels.record_numba import (
    WHOLE,
    as_array,
    highest,
    jit,
    jit_finite,
    kernel,
    lowest,
    rotate,
    share,
    store_halves,
    store_scales,
    turn,
    workers,
)
from strop.kernels.tiles import LOG_CLIP, STD_CLIP, TIE, TileForm

LOG_LOW, LOG_HIGH = (np.float32(bound) for bound in LOG_CLIP)
STD_LOW, STD_HIGH = (np.float32(bound) for bound in STD_CLIP)
EQUAL = np.float32(1 + TIE)
LARGEST = np.float32(3e38)
PACKING = 64
"""Codes that are attended over while one is packed."""


def encode(keys: Tensor, values: Tensor, form: TileForm) -> Tensor:
    """Pack keys and values into records, as `Kernels` says."""
    tokens = [
        x.detach().float().reshape(-1, form.group, form.dim).contiguous().numpy() for x in (keys, values)
    ]
    records = torch.zeros(*keys.shape[:-2], form.record_bytes, dtype=torch.uint8)
    given = *tokens, as_array(form), records.view(-1, form.record_bytes).numpy()
    count = len(tokens[0])
    threads = min(workers(2 * keys.numel() * PACKING), max(count, 1))
    share(lambda first, last: _encode(*given, first, last), count, threads)
    return records


@kernel
def _encode(keys, values, forms, records, first, last):
    """Records `first` to `last`."""
    form = forms[0]
    tokens = np.empty((form.group, form.dim), np.float32)
    channels = np.empty((form.dim, form.group), np.float32)
    for i in range(first, last):
        _prepare(keys[i], form.rotation, tokens, channels)
        _write(channels, tokens, form, form.keys, form.bits_k, records[i])
        _prepare(values[i], form.rotation, tokens, channels)
        _write(tokens, channels, form, form.values, form.bits_v, records[i])


@jit
def _prepare(x, rotated, tokens, channels):
    """Copy `x` `[G, D]`, rotated or not, to `channels` and then to `tokens`."""
    turn(x, channels)
    if rotated:
        rotate(channels)
    turn(channels, tokens)


@jit
def _write(tile, turned, form, at, bits, record):
    """Write a tile `[R, C]` to its place in a record; the tile is used up."""
    rows, columns = tile.shape
    if form.balanced:
        column = _balance(tile, turned, form.n_iter, form.min_std)
        store_scales(column, record, at.column, form.fp8)
        for c in range(columns):
            column[c] = _positive(column[c])
        for r in range(rows):
            for c in range(columns):
                tile[r, c] /= column[c]
    scale, zero = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for r in range(rows):
        low, nothing = lowest(tile[r]), np.float32(0)
        for c in range(columns):
            nothing += 0 * tile[r, c]
        scale[r], zero[r] = (highest(tile[r]) - low) / (2**bits - 1), low + nothing
    store_scales(scale, record, at.scale, form.fp8)
    store_halves(zero, record, at.zero)
    for r in range(rows):
        _round(tile[r], zero[r], _positive(scale[r]), bits, record, at.codes + r * columns * bits // 8)


@jit
def _positive(scale):
    return scale if scale > 0 else np.float32(1)


@jit
def _round(row, zero, scale, bits, record, at):
    """Round a row of a tile to codes, and pack them at byte `at` of a record."""
    top, lanes = np.float32(2**bits - 1), 8 // bits
    codes = np.empty(len(row), np.uint8)
    for c in range(len(row)):
        code = min(max((row[c] - zero) / scale, np.float32(0)), top)
        codes[c] = np.float32(code + WHOLE).view(np.uint32)
    for i in range(len(row) // lanes):
        byte = np.uint8(0)
        for lane in range(lanes):
            byte |= codes[i * lanes + lane] << np.uint8(lane * bits)
        record[at + i] = byte


# Balancing.


@jit
def _balance(tile, turned, n_iter, min_std):
    """VarN's column scales `[C]`, as `strop.kv.kvarn.varn` finds them."""
    rows, columns = tile.shape
    log_r, log_c = np.zeros(rows, np.float32), np.zeros(columns, np.float32)
    by_row, by_column = np.ones(rows, np.float32), np.ones(columns, np.float32)
    std = np.empty(rows + columns, np.float32)
    row_std, column_std = std[:rows], std[rows:]
    _deviations(tile, by_row, by_column, row_std)
    _deviations(turned, by_column, by_row, column_std)
    unit = _least(std) if min_std else np.float32(1)
    for i in range(len(std)):
        std[i] /= unit
    best, scale = _imbalance(row_std) + _imbalance(column_std), np.empty(columns, np.float32)
    for c in range(columns):
        scale[c] = unit
    for _ in range(n_iter):
        _grow(log_c, column_std, by_column, unit)
        _deviations(tile, by_row, by_column, row_std)
        _grow(log_r, row_std, by_row, np.float32(1))
        _deviations(turned, by_column, by_row, column_std)
        now = _imbalance(row_std) + _imbalance(column_std)
        if now <= best * EQUAL:
            best = now
            for c in range(columns):
                scale[c] = 1 / by_column[c]
    return scale


@jit
def _deviations(tile, by_row, by_column, std):
    """Unbiased deviations of the rows of `tile` times its factors, into `std`."""
    columns = tile.shape[1]
    for r in range(len(tile)):
        total, squares = np.float32(0), np.float32(0)
        for c in range(columns):
            total += tile[r, c] * by_column[c]
        mean = np.float32(total / columns)
        for c in range(columns):
            centered = tile[r, c] * by_column[c] - mean
            squares += centered * centered
        std[r] = np.sqrt(np.float32(squares / (columns - 1))) * by_row[r]


@jit
def _grow(log_scale, std, factor, unit):
    """Fold deviations into log scales, and set factors and deviations to what they are then."""
    for i in range(len(std)):
        grown = log_scale[i] + np.log(min(max(std[i], STD_LOW), STD_HIGH))
        log_scale[i] = min(max(grown, LOG_LOW), LOG_HIGH)
        before, factor[i] = factor[i], np.exp(-log_scale[i]) / unit
        std[i] *= factor[i] / before


@jit_finite
def _least(std):
    """The smallest deviation, zero tokens and constant channels left out; 1 if none is."""
    floor, least = np.float32(1e-6) * highest(std), np.float32(LARGEST)
    for deviation in std:
        least = min(least, deviation if deviation > floor else np.float32(LARGEST))
    return least if least < LARGEST else np.float32(1)


@jit
def _imbalance(std):
    return highest(std) / _least(std)
