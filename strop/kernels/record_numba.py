"""What numba kernels share: how they are compiled, numbers in bytes, the rotation, and a pool of threads.

numba keeps compiled kernels on disk and compiles again when the kernel's own file changes. A change here
passes unnoticed: remove `__pycache__` after one.

What kernels call is inlined into them by force. Otherwise a compiled kernel holds weak copies of it. A
process that compiles has loaded each function by itself before, so the kernel jumps there; one that loads the
kernel from disk has only the copies. Both are the same source, optimised apart, and fast math lets them round
differently: last bits would depend on whether the kernel was compiled in this process.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, fields
from functools import lru_cache

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from strop.kernels.tiles import Fields, TileForm

FASTMATH = {"contract", "reassoc", "nsz"}
"""What may change a rounding, but hides neither NaN nor infinity."""
kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath=FASTMATH)
"""What Python calls."""
jit = njit(nogil=True, forceinline=True, error_model="numpy", fastmath=FASTMATH)
"""What kernels call."""
jit_finite = njit(nogil=True, forceinline=True, error_model="numpy", fastmath=True)
"""The same where a NaN may get lost."""

FORM = np.dtype(
    [
        (field.name, [(name, np.int64) for name in Fields._fields] if field.type is Fields else np.int64)
        for field in fields(TileForm)
    ]
)
"""A `TileForm` as kernels read it."""
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
E4M3_MAX, E4M3_TINY, E4M3_NORMAL = np.float32(448), np.float32(2**-9), np.float32(2**-6)
HALF_MAX = np.float32(65504)
WHOLE = np.float32(2**23)
"""Added to a number below it, rounds it to a whole one and leaves that in the lowest bits."""
ENOUGH = 1 << 23
"""Codes to attend over that are worth a thread."""


@lru_cache(maxsize=64)
def as_array(form: TileForm) -> np.ndarray:
    """A form as an array of one `FORM`."""
    return np.array([astuple(form)], dtype=FORM)


def workers(codes: int) -> int:
    """Threads to attend with over so many codes."""
    return min(torch.get_num_threads(), codes // ENOUGH + 1)


def share(work: Callable[[int, int], None], units: int, threads: int) -> None:
    """Call `work(first, last)` so that it covers all units, once a thread.

    The threads are Python's: numba's own abort when several Python threads call in.
    """
    edges = [units * thread // threads for thread in range(threads + 1)]
    if threads == 1:
        work(0, units)
    else:
        list(_pool().map(work, edges, edges[1:]))


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


@intrinsic
def from_half(context, bits):  # type: ignore[no-untyped-def]
    """An fp16 number, given as a uint16, in fp32."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), build


@intrinsic
def to_half(context, number):  # type: ignore[no-untyped-def]
    """An fp32 number in fp16, as a uint16."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), build


@jit
def load_halves(record, at, out):
    """The fp16 numbers at byte `at` of a record."""
    bits = record[at : at + 2 * len(out)].view(np.uint16)
    for i in range(len(out)):
        out[i] = from_half(bits[i])


@jit
def load_scales(record, at, fp8, out):
    """The scales at byte `at` of a record."""
    if fp8:
        behind = at + len(out)
        factor = record[behind : behind + 4].view(np.float32)[0]
        for i in range(len(out)):
            out[i] = E4M3[record[at + i]] * factor
    else:
        load_halves(record, at, out)


@jit
def store_halves(numbers, record, at):
    """Write numbers at byte `at` of a record in fp16, and leave what was written in `numbers`."""
    bits = record[at : at + 2 * len(numbers)].view(np.uint16)
    for i in range(len(numbers)):
        bits[i] = to_half(min(max(numbers[i], -HALF_MAX), HALF_MAX))
    load_halves(record, at, numbers)


@jit
def store_scales(numbers, record, at, fp8):
    """Write scales at byte `at` of a record, and leave what was written in `numbers`."""
    if not fp8:
        store_halves(numbers, record, at)
        return
    top = max(highest(numbers), np.float32(1e-30))
    for i in range(len(numbers)):
        number = max(numbers[i] / (top / E4M3_MAX), E4M3_TINY)
        if number < E4M3_NORMAL:
            record[at + i] = np.float32(number / E4M3_TINY + WHOLE).view(np.uint32)
        else:
            bits = np.float32(number).view(np.uint32)
            record[at + i] = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3)
    behind = at + len(numbers)
    record[behind : behind + 4].view(np.float32)[0] = top / E4M3_MAX
    load_scales(record, at, fp8, numbers)


@jit
def turn(x, out):
    """Copy `x` `[n, m]` to `out` `[m, n]`."""
    for i in range(len(x)):
        for j in range(x.shape[1]):
            out[j, i] = x[i, j]


@jit
def rotate(x):
    """Rotate the columns of `x` `[D, n]` in place."""
    dim, half, norm = len(x), 1, np.float32(1 / np.sqrt(len(x)))
    while half < dim:
        pairs = x.reshape(dim // (2 * half), 2, half * x.shape[1])
        for pair in range(len(pairs)):
            for i in range(pairs.shape[2]):
                one, other = pairs[pair, 0, i], pairs[pair, 1, i]
                pairs[pair, 0, i], pairs[pair, 1, i] = one + other, one - other
        half *= 2
    for d in range(dim):
        for i in range(x.shape[1]):
            x[d, i] *= norm


@jit_finite
def highest(numbers):
    """The largest of them; any if one is NaN."""
    top = numbers[0]
    for number in numbers:
        top = max(top, number)
    return top


@jit_finite
def lowest(numbers):
    """The smallest of them; any if one is NaN."""
    bottom = numbers[0]
    for number in numbers:
        bottom = min(bottom, number)
    return bottom
