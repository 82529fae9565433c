"""How Triton kernels see a record of packed tiles: its two sides, and their scales as they are stored."""

from dataclasses import dataclass

import triton
import triton.language as tl

from strop.kernels.tiles import Fields, TileForm


@dataclass(frozen=True)
class Side:
    """Half of a record as kernels know it: the tile `[R, C]` of its keys, or that of its values."""

    rows: int
    columns: int
    bits: int
    at: Fields
    form: TileForm

    @property
    def lanes(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    @property
    def width(self) -> int:
        """Bytes in a row, which are the columns of a lane."""
        return self.columns // self.lanes


def sides(form: TileForm) -> tuple[Side, Side]:
    """Keys, channels x tokens, and values, tokens x channels."""
    return (
        Side(form.dim, form.group, form.bits_k, form.keys, form),
        Side(form.group, form.dim, form.bits_v, form.values, form),
    )


@triton.jit
def store_scales(at, numbers, FP8: tl.constexpr):
    """Write numbers `[n]` in fp16, or in E4M3 under one factor; returns what will be read.

    m * 2**(e - 3), m from 8 to 15, is 8 * (e + 6) + m in E4M3; below 2**-6 its step stays that of e = -6.
    """
    COUNT: tl.constexpr = numbers.shape[0]
    if FP8:
        factor = tl.div_rn(tl.maximum(tl.max(numbers, 0), 1e-30), 448.0)
        small = tl.maximum(tl.div_rn(numbers, factor), 2.0**-9)
        exponent = tl.maximum((small.to(tl.int32, bitcast=True) >> 23) - 127, -6)
        per_step = ((130 - exponent) << 23).to(tl.float32, bitcast=True)
        code = (8 * (exponent + 6) + round_half_even(small * per_step).to(tl.int32)).to(tl.uint8)
        tl.store(at + tl.arange(0, COUNT), code)
        tl.store((at + COUNT).to(tl.pointer_type(tl.float32)), factor)
        stored = _e4m3(code) * factor
    else:
        half = tl.clamp(numbers, -65504.0, 65504.0).to(tl.float16)
        tl.store(at.to(tl.pointer_type(tl.float16)) + tl.arange(0, COUNT), half)
        stored = half.to(tl.float32)
    return stored


@triton.jit
def load_scales(at, index, COUNT: tl.constexpr, FP8: tl.constexpr):
    """Those of `COUNT` stored numbers that `index` says, in fp32."""
    if FP8:
        numbers = _e4m3(tl.load(at + index)) * tl.load((at + COUNT).to(tl.pointer_type(tl.float32)))
    else:
        numbers = tl.load(at.to(tl.pointer_type(tl.float16)) + index).to(tl.float32)
    return numbers


@triton.jit
def _e4m3(code):
    """Positive E4M3 numbers: fp16 has the same fields, and an exponent whose bias is 8 more."""
    return (code.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def round_half_even(x):
    """The nearest integer, of two the even one: beside 1.5 * 2**23 a float has no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0
