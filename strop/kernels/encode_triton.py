"""Packing tiles in Triton: a program holds a tile in registers, balances it by VarN, rounds and packs it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from strop.core.hadamard import rotate
from strop.kernels.record_triton import round_half_even, sides, store_scales
from strop.kernels.tiles import LOG_CLIP, STD_CLIP, TIE, TileForm

EQUAL = tl.constexpr(1 + TIE)
LEAST_LOG, MOST_LOG = tl.constexpr(LOG_CLIP[0]), tl.constexpr(LOG_CLIP[1])
LEAST_STD, MOST_STD = tl.constexpr(STD_CLIP[0]), tl.constexpr(STD_CLIP[1])


def encode(keys: Tensor, values: Tensor, form: TileForm) -> Tensor:
    """Pack `[..., G, D]` keys and values into uint8 records `[..., record_bytes]`."""
    if form.rotation:
        keys, values = rotate(keys.float()), rotate(values.float())
    records = keys.new_zeros(*keys.shape[:-2], form.record_bytes, dtype=torch.uint8)
    if tiles := records.numel() // form.record_bytes:
        warps = max(form.dim * form.group // 2048, 4)
        _encode[tiles, 2](keys.contiguous(), values.contiguous(), records, *sides(form), num_warps=warps)
    return records


@triton.jit
def _encode(keys, values, records, KEYS: tl.constexpr, VALUES: tl.constexpr):
    """Program (tile, 0) packs keys `[G, D]`, transposed; program (tile, 1) values."""
    tile = tl.program_id(0).to(tl.int64)
    first, record = tile * (KEYS.rows * KEYS.columns), records + tile * KEYS.form.record_bytes
    if tl.program_id(1) == 0:
        _write(keys + first, 1, KEYS.rows, record, KEYS)
    else:
        _write(values + first, VALUES.columns, 1, record, VALUES)


@triton.jit
def _write(source, ROW_STEP: tl.constexpr, COLUMN_STEP: tl.constexpr, record, SIDE: tl.constexpr):
    """Round a tile against its scales as they are stored: `strop.kv.codec.Layout.write`."""
    rows, columns = tl.arange(0, SIDE.rows), tl.arange(0, SIDE.columns)
    tile = tl.load(source + rows[:, None] * ROW_STEP + columns[None, :] * COLUMN_STEP).to(tl.float32)
    if SIDE.form.balanced:
        column = store_scales(record + SIDE.at.column, _varn(tile, SIDE), SIDE.form.fp8)
        tile = tl.div_rn(tile, _positive(column)[None, :])
    TOP: tl.constexpr = 2**SIDE.bits - 1
    low, high = tl.min(tile, 1), tl.max(tile, 1)
    zero = store_scales(record + SIDE.at.zero, low, False)
    scale = store_scales(record + SIDE.at.scale, (high - low) / TOP, SIDE.form.fp8)
    codes = tl.div_rn(tile - zero[:, None], _positive(scale)[:, None])
    codes = tl.clamp(round_half_even(codes), 0.0, TOP * 1.0).to(tl.int32)
    lanes = tl.reshape(codes, (SIDE.rows, SIDE.width, SIDE.lanes))
    packed = tl.sum(lanes << (tl.arange(0, SIDE.lanes) * SIDE.bits)[None, None, :], 2)
    at = rows[:, None] * SIDE.width + tl.arange(0, SIDE.width)[None, :]
    tl.store(record + SIDE.at.codes + at, packed.to(tl.uint8))


@triton.jit
def _varn(tile, SIDE: tl.constexpr):
    """Scales of a tile's columns by VarN, those of the lowest imbalance: `strop.kv.kvarn.varn`."""
    of_rows, of_columns = _deviation(tile, 1), _deviation(tile, 0)
    unit = 1.0
    if SIDE.form.min_std:
        most = tl.maximum(tl.max(of_rows, 0), tl.max(of_columns, 0))
        least = tl.minimum(_least(of_rows, most), _least(of_columns, most))
        unit = tl.where(least < float("inf"), least, 1.0)
    tile, of_columns = tile / unit, of_columns / unit
    best = _spread(of_columns) + _spread(of_rows / unit)
    log_r, log_c = tl.zeros_like(of_rows), tl.zeros_like(of_columns)
    best_c = log_c
    for _ in range(SIDE.form.n_iter):
        log_c = _grow(log_c, of_columns)
        log_r = _grow(log_r, _deviation(_scaled(tile, log_r, log_c), 1))
        now = _scaled(tile, log_r, log_c)
        of_columns = _deviation(now, 0)
        imbalance = _spread(of_columns) + _spread(_deviation(now, 1))
        better = imbalance <= best * EQUAL
        best, best_c = tl.where(better, imbalance, best), tl.where(better, log_c, best_c)
    return tl.exp(best_c) * unit


@triton.jit
def _deviation(tile, AXIS: tl.constexpr):
    """Unbiased standard deviation along an axis."""
    COUNT: tl.constexpr = tile.shape[AXIS]
    apart = tile - tl.expand_dims(tl.sum(tile, AXIS) / COUNT, AXIS)
    return tl.sqrt(tl.sum(apart * apart, AXIS) / (COUNT - 1))


@triton.jit
def _least(std, most):
    """The smallest of deviations `[n]`, those far below `most` left out; infinity if none is left."""
    return tl.min(tl.where(std > 1e-6 * most, std, float("inf")), 0)


@triton.jit
def _spread(std):
    """Max / min of deviations `[n]`; 0 if all are."""
    most = tl.max(std, 0)
    return most / _least(std, most)


@triton.jit
def _grow(log_scale, std):
    """Fold deviations into log scales, within the paper's clips."""
    return tl.clamp(log_scale + tl.log(tl.clamp(std, LEAST_STD, MOST_STD)), LEAST_LOG, MOST_LOG)


@triton.jit
def _scaled(tile, log_r, log_c):
    """The tile divided by its scales."""
    return tile * tl.exp(-log_c)[None, :] * tl.exp(-log_r)[:, None]


@triton.jit
def _positive(scale):
    """Scales to divide by: 1 where a constant row or an empty column left none."""
    return tl.where(scale > 0, scale, 1.0)
