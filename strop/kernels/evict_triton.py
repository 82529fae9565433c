"""The functions of `strop.kernels.evict` on a GPU, in Triton; what they do is said there.

Nothing larger than a number a slot is stored: probabilities stay in registers, the largest scores are found
by bisection of their bits instead of a sort, and a cache is compacted where it lies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from strop.kernels import evict

LOG2_E = 1.4426950408889634
LOWEST = tl.constexpr(-1e30)
SLOTS = tl.constexpr(64)
"""Slots of keys or values that a program reads at a time."""
POINTS = tl.constexpr(1024)
"""Numbers that a program of `gumbel` turns out."""
COUNTERS = tl.constexpr(evict.HEAD_STRIDE)


# Scores.


def observe(window: Tensor, keys: Tensor, lengths: Tensor, scaling: float) -> Tensor:
    """Mean probability of each slot `[B, H_kv, n]`: one pass over the keys to sum, one to average.

    Keys of more than 512 bytes do not fit in shared memory and are left to torch.
    """
    (batch, heads, queries, dim), (_, heads_kv, slots, _) = window.shape, keys.shape
    row_bytes = dim * keys.element_size()
    if row_bytes > 512:
        return evict.observe(window, keys, lengths, scaling)
    sums = keys.new_empty(batch, heads, queries, dtype=torch.float32)
    means = keys.new_empty(batch, heads_kv, slots, dtype=torch.float32)
    tensors = (window.contiguous(), keys, lengths, sums)
    sizes = (scaling * LOG2_E, heads_kv, heads // heads_kv, queries, slots, dim, *keys.stride()[:3])
    shape = {"WIDTH": _power(queries), "DIM": _power(dim), "num_stages": 3 if row_bytes <= 256 else 1}
    _sums[batch * heads,](*tensors, *sizes, **shape)
    _means[batch * heads_kv, triton.cdiv(slots, SLOTS.value)](*tensors, means, *sizes, **shape)
    return means


def _power(size: int) -> int:
    """The size of a block that holds `size` and that tensor cores take."""
    return max(triton.next_power_of_2(size), 16)


@triton.jit(do_not_specialize=("slots",))
def _sums(
    window, keys, lengths, sums,
    scaling, heads_kv, groups, queries, slots, dim, step_b, step_h, step_n,
    WIDTH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Program (row, head): log2 of the sum of 2**logit over a row's slots, for each query of a head."""
    head, index = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    pair, row = head // groups, head // groups // heads_kv
    keys += row * step_b + pair % heads_kv * step_h
    query = _queries(window, head, queries, dim, WIDTH, DIM)
    top, total = tl.zeros((WIDTH,), tl.float32) + LOWEST, tl.zeros((WIDTH,), tl.float32)
    held = tl.load(lengths + row).to(tl.int32)
    for first in range(0, held, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        logits = _logits(keys, slot, held, step_n, dim, query, scaling)
        new_top = tl.maximum(top, tl.max(logits, 0))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logits - new_top[None, :]), 0)
        top = new_top
    tl.store(sums + head * queries + index, top + tl.log2(total), mask=index < queries)


@triton.jit(do_not_specialize=("slots",))
def _means(
    window, keys, lengths, sums, means,
    scaling, heads_kv, groups, queries, slots, dim, step_b, step_h, step_n,
    WIDTH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Program (pair, block): the mean over all queries that share a row's KV head, for a block of slots."""
    pair, slot = tl.program_id(0).to(tl.int64), tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    row, index = pair // heads_kv, tl.arange(0, WIDTH)
    keys += row * step_b + pair % heads_kv * step_h
    held, mean = tl.load(lengths + row), tl.zeros((SLOTS,), tl.float32)
    for group in range(groups):
        head = pair * groups + group
        query = _queries(window, head, queries, dim, WIDTH, DIM)
        logits = _logits(keys, slot, held, step_n, dim, query, scaling)
        total = tl.load(sums + head * queries + index, mask=index < queries, other=float("inf"))
        mean += tl.sum(tl.exp2(logits - total[None, :]), 1)
    mean = tl.where(slot < held, mean / (groups * queries), 0.0)
    tl.store(means + pair * slots + slot, mean, mask=slot < slots)


@triton.jit
def _queries(window, head, queries, dim, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """A head's queries, as columns `[D, W]`."""
    index, channel = tl.arange(0, WIDTH)[None, :], tl.arange(0, DIM)[:, None]
    at = (head * queries + index) * dim + channel
    return tl.load(window + at, mask=(index < queries) & (channel < dim), other=0.0)


@triton.jit
def _logits(keys, slot, held, step, dim, query, scaling):
    """Logits to base 2 of some slots `[SLOTS, W]`; -inf for one that is not held."""
    channel, real = tl.arange(0, query.shape[0])[None, :], (slot < held)[:, None]
    key = tl.load(keys + slot[:, None].to(tl.int64) * step + channel, mask=real & (channel < dim), other=0.0)
    return tl.where(real, tl.dot(key, query, input_precision="tf32x3") * scaling, -float("inf"))


def value_range(values: Tensor) -> Tensor:
    """max_j v_j - min_j v_j of each slot `[B, H_kv, n]`."""
    batch, heads, slots, dim = values.shape
    out = values.new_empty(batch, heads, slots, dtype=torch.float32)
    grid = (batch * heads, triton.cdiv(slots, SLOTS.value))
    _range[grid](values, out, heads, slots, dim, *values.stride()[:3], DIM=_power(dim))
    return out


@triton.jit(do_not_specialize=("slots",))
def _range(values, out, heads, slots, dim, step_b, step_h, step_n, DIM: tl.constexpr):
    """Program (pair, block): the range of each of a block of slots."""
    pair, slot = tl.program_id(0).to(tl.int64), tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    values += pair // heads * step_b + pair % heads * step_h
    channel = tl.arange(0, DIM)[None, :]
    real = (slot < slots)[:, None] & (channel < dim)
    value = tl.load(values + slot[:, None].to(tl.int64) * step_n + channel, mask=real, other=0.0)
    value = value.to(tl.float32)
    high = tl.max(tl.where(real, value, -float("inf")), 1)
    low = tl.min(tl.where(real, value, float("inf")), 1)
    tl.store(out + pair * slots + slot, high - low, mask=slot < slots)


def gumbel(log_weights: Tensor, positions: Tensor, low: int, high: int) -> Tensor:
    """Log weights `[B, H_kv, n]` plus keyed Gumbel noise."""
    _, heads, slots = positions.shape
    log_weights, positions = log_weights.contiguous(), positions.contiguous()
    out = torch.empty_like(log_weights)
    grid = (triton.cdiv(out.numel(), POINTS.value),)
    _gumbel[grid](log_weights, positions, out, out.numel(), slots, heads, low, high)
    return out


@triton.jit(do_not_specialize=("count", "slots", "low", "high"))
def _gumbel(log_weights, positions, out, count, slots, heads, low, high):
    """The noise in float64: it decides which token stays, and must not depend on the device."""
    at = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    real = at < count
    counter = at // slots % heads * COUNTERS + tl.load(positions + at, mask=real, other=0)
    word = _mix(_mix(counter.to(tl.uint32) ^ low.to(tl.uint32)) + high.to(tl.uint32))
    uniform = (word.to(tl.float64) + 0.5) * 2.0**-32
    noise = tl.log(-tl.log(uniform)).to(tl.float32)
    tl.store(out + at, tl.load(log_weights + at, mask=real, other=0.0) - noise, mask=real)


@triton.jit
def _mix(x):
    """The finaliser of MurmurHash3, as in `strop.core.sampling`."""
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return x ^ (x >> 16)


# Choice.


def keep_top(scores: Tensor, count: int) -> Tensor:
    """Slots of the `count` largest scores `[B, H_kv, n]`, ascending: `[B, H_kv, count]` int32."""
    batch, heads, slots = scores.shape
    kept = scores.new_empty(batch, heads, count, dtype=torch.int32)
    block = triton.next_power_of_2(slots)
    warps = min(max(block // 512, 4), 32)
    _keep_top[batch * heads,](scores.contiguous(), kept, slots, count, BLOCK=block, num_warps=warps)
    return kept


@triton.jit(do_not_specialize=("slots", "count"))
def _keep_top(scores, kept, slots, count, BLOCK: tl.constexpr):
    """Find the count-th largest score bit by bit, then number what is above it and the latest of its equals.

    Flipping all bits of a negative float, and the sign of another, makes unsigned integers in the same order.
    """
    pair, slot = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    score = tl.load(scores + pair * slots + slot, mask=slot < slots, other=0.0) + 0.0
    bits = score.to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) | -(2**31))).to(tl.uint32, bitcast=True)
    order = tl.where(slot < slots, order, 0)
    bit = tl.full((), 2**31, tl.uint32)
    least = bit ^ bit
    for _ in range(32):
        enough = tl.sum((order >= (least | bit)).to(tl.int32), 0) >= count
        least = tl.where(enough, least | bit, least)
        bit = bit >> 1
    above, equal = (order > least).to(tl.int32), (order == least).to(tl.int32)
    spare = tl.sum(above + equal, 0) - count
    take = above + equal * (tl.cumsum(equal, 0) > spare).to(tl.int32)
    tl.store(kept + pair * count + tl.cumsum(take, 0) - 1, slot, mask=take > 0)


# Compaction.


def gather(cache: Tensor, kept: Tensor, lengths: Tensor, recent: int) -> None:
    """Compact `cache` `[B, H_kv, m, D]` in place: the kept slots, then the last `recent` of each row."""
    (batch, heads, slots, dim), count = cache.shape, kept.shape[2]
    width = min(triton.next_power_of_2(dim), 64)
    _gather[batch * heads, triton.cdiv(dim, width)](
        cache, kept, lengths, heads, slots, dim, count, recent, *cache.stride()[:3],
        WIDTH=width, BLOCK=4096 // width, COUNT=triton.next_power_of_2(count),
    )  # fmt: skip


@triton.jit(do_not_specialize=("slots", "count", "recent"))
def _gather(
    cache, kept, lengths, heads, slots, dim, count, recent, step_b, step_h, step_n,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Program (pair, channels) moves blocks of slots in turn; no slot moves back, so none is lost.

    A block is read as a whole before any of it is written, and what later blocks read lies behind it.
    """
    pair, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    cache += pair // heads * step_b + pair % heads * step_h
    kept += pair * count
    start = tl.maximum(tl.load(lengths + pair // heads).to(tl.int32) - recent, 0)
    index = tl.arange(0, COUNT)
    older = tl.load(kept + index, mask=index < count, other=2**31 - 1) < start
    chosen = tl.sum(older.to(tl.int32), 0)
    for first in range(0, count + recent, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        source = tl.load(kept + slot, mask=slot < chosen, other=0)
        source = tl.where(slot < chosen, source, tl.minimum(start + slot - chosen, slots - 1)).to(tl.int64)
        mask = (slot < count + recent)[:, None] & (channel < dim)[None, :]
        block = tl.load(cache + source[:, None] * step_n + channel[None, :], mask=mask)
        tl.debug_barrier()
        tl.store(cache + slot.to(tl.int64)[:, None] * step_n + channel[None, :], block, mask=mask)
