"""x W^T on packed codes for CPUs, in numba: what surrounds the inner loops of `linear_vectors`.

A code of several planes is multiplied plane by plane. Where zeros are stored, (middle - zero) * scale times
the sum of a group's inputs is added. Left out: groups that are neither small powers of two nor whole chunks.
"""

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

from strop.kernels.linear_vectors import BLOCK, CHUNK, LANES, SMALL, product
from strop.kernels.record_numba import from_half, jit, share, to_half, workers

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WIDE, NARROW = LANES[8], LANES[1]
strict = njit(nogil=True, forceinline=True, error_model="numpy")
"""What the kernel calls; no fast math, which would let the compiler choose the order of sums."""
one_8, one_4, one_2, one_1 = (product(width, 1) for width in (8, 4, 2, 1))
block_8, block_4, block_2, block_1 = (product(width, BLOCK) for width in (8, 4, 2, 1))


def supports(inputs: int, group: int) -> bool:
    """Whether rows fill whole chunks, and groups or chunks divide one another."""
    return inputs % CHUNK == 0 and (group % CHUNK == 0 or group in SMALL)


def multiply(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """Map `x` `[..., I]` to `[..., O]`, as `Kernels` says.

    Tensors go in by address: to wrap them as arrays takes longer than a small product.
    """
    *batch, inputs = x.shape
    outputs, groups = scale.shape
    out, rows = x.new_empty(*batch, outputs), x.numel() // inputs
    x, packed, scale = x.contiguous(), packed.contiguous(), scale.contiguous()
    zero, bias = (None if given is None else given.contiguous() for given in (zero, bias))
    at_zero, at_bias = 0 if zero is None else zero.data_ptr(), 0 if bias is None else bias.data_ptr()
    places = out.data_ptr(), x.data_ptr(), packed.data_ptr(), scale.data_ptr(), at_zero, at_bias
    given = *places, rows, outputs, inputs, groups, bits, KINDS[x.dtype]
    threads = workers(rows * outputs * inputs)
    if threads == 1:
        _multiply(*given, 0, outputs)
    else:
        share(lambda first, last: _multiply(*given, first, last), outputs, threads)
    return out


@njit(nogil=True, cache=True, error_model="numpy")
def _multiply(out, x, packed, scale, zero, bias, rows, outputs, inputs, groups, bits, kind, first, last):
    """Outputs `first` to `last` of all rows. Tensors are given by address, 0 for None."""
    count, pitch = last - first, inputs * bits // 8
    plain = np.empty((rows, inputs), np.float32)
    _read(x, kind, 0, plain.reshape(-1))
    padded = np.zeros(count * groups + WIDE, np.float32)
    scales = padded[: count * groups].reshape(count, groups)
    _read(scale, kind, first * groups, scales.reshape(-1))
    sums = np.zeros((rows, count), np.float32)
    if bias:
        for row in range(rows):
            _read(bias, kind, first, sums[row])
    if zero or bits == 1:
        zeros = np.full((count, groups), np.float32(0.5))
        if zero:
            _read(zero, kind, first * groups, zeros.reshape(-1))
        _add_middles(plain, zeros, scales, np.float32(1 << (bits - 1)), sums)
    ordered = np.empty_like(plain)
    _order(plain, WIDE if bits == 8 else NARROW, ordered)
    _add_products(packed + first * pitch, pitch, bits, ordered, scales, sums)
    for row in range(rows):
        _write(sums[row], kind, out, row * outputs + first)


@strict
def _add_products(codes, pitch, bits, x, scales, sums):
    """Add to `sums` `[R, O]` the products of ordered inputs `[R, I]` and codes less their middle."""
    (rows, inputs), (outputs, groups) = x.shape, scales.shape
    place, far, by = 0, 4 * outputs, scales.ctypes.data
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        middle, factor = np.float32(1 << (width - 1)), np.float32(1 << place)
        if place + width < bits:
            middle = np.float32(0)
        row = 0
        while row < rows:
            size = BLOCK if row + BLOCK <= rows else 1
            at, to = x.ctypes.data + 4 * row * inputs, sums.ctypes.data + row * far
            given = codes, at, by, to, pitch, groups, inputs, outputs, far, inputs // groups, middle, factor
            if size == BLOCK:
                _add_block(width, given)
            else:
                _add_one(width, given)
            row += size
        codes += inputs * width // 8
        place += width


@strict
def _add_one(width, given):
    """One row's product."""
    if width == 8:
        one_8(*given)
    elif width == 4:
        one_4(*given)
    elif width == 2:
        one_2(*given)
    else:
        one_1(*given)


@strict
def _add_block(width, given):
    """A block's product."""
    if width == 8:
        block_8(*given)
    elif width == 4:
        block_4(*given)
    elif width == 2:
        block_2(*given)
    else:
        block_1(*given)


@strict
def _order(x, lanes, out):
    """Inputs `[R, I]` as chunks of codes meet them: by place in a word, then by lane."""
    places = CHUNK // lanes
    for row in range(len(x)):
        for first in range(0, x.shape[1], CHUNK):
            for place in range(places):
                for lane in range(lanes):
                    out[row, first + place * lanes + lane] = x[row, first + lane * places + place]


@strict
def _add_middles(x, zeros, scales, middle, sums):
    """Add (middle - zero) * scale * sum of the group's inputs to `sums` `[R, O]`, for inputs `[R, I]`."""
    groups = scales.shape[1]
    totals, group = np.empty(groups, np.float32), x.shape[1] // groups
    for row in range(len(x)):
        for g in range(groups):
            totals[g] = _total(x[row, g * group : (g + 1) * group])
        for o in range(len(scales)):
            sums[row, o] += _middle(totals, zeros[o], scales[o], middle)


@jit
def _total(x):
    """The sum of x; its loop stores nothing, or where things lie would decide the order of the sum."""
    total = np.float32(0)
    for number in x:
        total += number
    return total


@jit
def _middle(totals, zeros, scales, middle):
    """The same for the sum of (middle - zero) * scale * total."""
    total = np.float32(0)
    for g in range(len(totals)):
        total += totals[g] * ((middle - zeros[g]) * scales[g])
    return total


@intrinsic
def _pointer(context, address, kind):  # type: ignore[no-untyped-def]
    """An address as a pointer to numbers of a type."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind.dtype)(types.int64, kind), build


@strict
def _read(address, kind, start, out):
    """A tensor's numbers from `start` on, in float32."""
    if kind == 0:
        out[:] = carray(_pointer(address + 4 * start, np.float32), out.shape)
        return
    halves = carray(_pointer(address + 2 * start, np.uint16), out.shape)
    if kind == 1:
        for i in range(len(out)):
            out[i] = np.uint32(np.uint32(halves[i]) << np.uint32(16)).view(np.float32)
    else:
        for i in range(len(out)):
            out[i] = from_half(halves[i])


@strict
def _write(numbers, kind, address, start):
    """Round numbers into a tensor, from `start` on."""
    if kind == 0:
        carray(_pointer(address + 4 * start, np.float32), numbers.shape)[:] = numbers
        return
    halves = carray(_pointer(address + 2 * start, np.uint16), numbers.shape)
    if kind == 1:
        for i in range(len(numbers)):
            bits = np.float32(numbers[i]).view(np.uint32)
            up = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
            halves[i] = (bits + up if numbers[i] == numbers[i] else bits) >> np.uint32(16)
    else:
        for i in range(len(numbers)):
            halves[i] = to_half(numbers[i])
