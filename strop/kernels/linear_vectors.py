"""The inner loops of `linear_numba` in LLVM's vectors: products of packed codes and inputs.

A code in a word of 32 bits becomes a float by setting the exponent of 2^23 above it: the word then reads
2^23 + code, and one subtraction leaves code - middle, exactly. A vector holds the words of a chunk of inputs,
some codes in each lane; inputs lie in the order of places in a word, then lanes. The order of every sum is
written down here, so a row's result does not depend on the other rows or on where things lie.

numba does not compile again when this file changes: remove `__pycache__` then.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

CHUNK = 64
"""Inputs that are multiplied at a time."""
BLOCK = 4
"""Rows of inputs that are multiplied at a time; fewer are multiplied one by one."""
LANES = {1: 8, 2: 8, 4: 8, 8: 16}
"""Words that hold the codes of a chunk, by width; a word has 32 bits at most."""
SMALL = (8, 16, 32)
"""Group sizes that divide a chunk; other groups are whole chunks."""
MANTISSA, BIAS = 23, 127
I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


class _Product:
    """Writes code that adds, for every output o and row r, `factor` * product to `out[r, o]`.

    The product is the sum over segments of scale * sum (code - middle) * x, for one plane of codes, of
    `width` bits. A segment is a group, or a chunk where groups are `SMALL`. The arguments are those of
    `product`: addresses of codes, ordered inputs, scales and out, in float32 but for the codes; bytes from
    one output's codes to the next; scales an output; inputs; outputs; bytes from one row of out to the next;
    the size of a group; middle; factor. Scales are read up to a vector past their end.
    """

    def __init__(self, width: int, block: int, builder: Any, arguments: Any) -> None:
        self.width, self.block, self.builder, self.lanes = width, block, builder, LANES[width]
        self.words, self.floats = ir.VectorType(I32, self.lanes), ir.VectorType(F32, self.lanes)
        (self.codes, self.x, self.scales, self.out, self.pitch, self.groups) = arguments[:6]
        (self.inputs, self.outputs, self.far, self.group, middle, self.factor) = arguments[6:]
        kind = ir.FunctionType(self.floats, [self.floats] * 3)
        self.fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{self.lanes}f32")
        empty = ir.Constant(self.floats, ir.Undefined)
        middles = builder.shuffle_vector(
            builder.insert_element(empty, middle, I32(0)), empty, self.integers(0)
        )
        self.base = builder.fadd(self.reals(2.0**MANTISSA), middles)
        self.totals, self.even, self.odd = ([self.cell() for _ in range(block)] for _ in range(3))
        self.scale = self.cell()
        small = builder.icmp_signed("<", self.group, I64(CHUNK))
        self.chunks = builder.select(small, I64(1), builder.udiv(self.group, I64(CHUNK)))
        self.of_segment = builder.select(small, builder.udiv(I64(CHUNK), self.group), I64(1))
        self.segments = builder.udiv(self.inputs, builder.mul(self.chunks, I64(CHUNK)))

    def write(self) -> None:
        """All outputs."""
        with cgutils.for_range(self.builder, self.outputs, intp=I64) as output:
            codes = self.at(self.codes, output.index, self.pitch)
            scales = self.at(self.scales, output.index, self.builder.mul(self.groups, I64(4)))
            self.clear(self.totals)
            with cgutils.for_range(self.builder, self.segments, intp=I64) as segment:
                self.segment(codes, scales, segment.index)
            for row, total in enumerate(self.totals):
                self.store(total, self.at(self.at(self.out, output.index, 4), self.far, row))

    def segment(self, codes: Any, scales: Any, index: Any) -> None:
        """Add a segment's scaled product to the totals."""
        builder = self.builder
        self.clear(self.even + self.odd)
        first = builder.mul(index, self.chunks)
        with cgutils.for_range(builder, self.chunks, intp=I64) as chunk:
            self.chunk(codes, builder.add(first, chunk.index))
        scales = self.load(self.floats, self.at(scales, builder.mul(index, self.of_segment), 4))
        builder.store(self.share(scales, CHUNK), self.scale)
        for group in SMALL:
            with builder.if_then(builder.icmp_signed("==", self.group, I64(group)), likely=False):
                builder.store(self.share(scales, group), self.scale)
        for total, even, odd in zip(self.totals, self.even, self.odd, strict=True):
            self.add_product(
                builder.fadd(builder.load(even), builder.load(odd)), builder.load(self.scale), total
            )

    def chunk(self, codes: Any, index: Any) -> None:
        """Add the products of a chunk of codes, those of even places in a word and of odd ones apart."""
        builder = self.builder
        packed = ir.VectorType(ir.IntType(CHUNK // self.lanes * self.width), self.lanes)
        words = self.load(packed, self.at(codes, index, CHUNK * self.width // 8), align=1)
        words = words if packed == self.words else builder.zext(words, self.words)
        x = self.at(self.x, index, 4 * CHUNK)
        for place in range(CHUNK // self.lanes):
            field = builder.lshr(words, self.integers(place * self.width))
            field = builder.and_(field, self.integers(2**self.width - 1))
            field = builder.or_(field, self.integers((BIAS + MANTISSA) << MANTISSA))
            number = builder.fsub(builder.bitcast(field, self.floats), self.base)
            for row, total in enumerate(self.odd if place % 2 else self.even):
                inputs = self.at(self.at(x, self.inputs, 4 * row), I64(place), 4 * self.lanes)
                self.add_product(number, self.load(self.floats, inputs), total)

    def share(self, scales: Any, group: int) -> Any:
        """The scale of each lane of a chunk, from those of its groups."""
        lanes = [lane * CHUNK // self.lanes // group for lane in range(self.lanes)]
        return self.builder.shuffle_vector(scales, scales, ir.Constant(self.words, lanes))

    def store(self, total: Any, address: Any) -> None:
        """Add `factor` times the sum of a total's lanes, by halves, to the number at `address`."""
        builder, vector, half = self.builder, self.builder.load(total), self.lanes // 2
        while half:
            kind = ir.VectorType(I32, half)
            low, high = (ir.Constant(kind, [*range(first, first + half)]) for first in (0, half))
            low, high = (builder.shuffle_vector(vector, vector, part) for part in (low, high))
            vector, half = builder.fadd(low, high), half // 2
        place = builder.inttoptr(address, F32.as_pointer())
        added = builder.fmul(builder.extract_element(vector, I32(0)), self.factor)
        builder.store(builder.fadd(builder.load(place), added), place)

    def add_product(self, one: Any, other: Any, total: Any) -> None:
        """total += one * other."""
        self.builder.store(self.builder.call(self.fma, [one, other, self.builder.load(total)]), total)

    def clear(self, totals: list[Any]) -> None:
        """totals = 0."""
        for total in totals:
            self.builder.store(self.reals(0.0), total)

    def cell(self) -> Any:
        """A variable for a vector of floats."""
        return cgutils.alloca_once(self.builder, self.floats)

    def at(self, address: Any, index: Any, size: Any) -> Any:
        """The address of an element of an array."""
        size = I64(size) if isinstance(size, int) else size
        return self.builder.add(address, self.builder.mul(index, size))

    def load(self, kind: Any, address: Any, align: int = 4) -> Any:
        """What lies at an address."""
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=align)

    def integers(self, number: int) -> Any:
        """A vector of one integer."""
        return ir.Constant(self.words, [number] * self.lanes)

    def reals(self, number: float) -> Any:
        """A vector of one float."""
        return ir.Constant(self.floats, [number] * self.lanes)


def product(width: int, block: int) -> Callable[..., None]:
    """What `_Product` writes, as a function for kernels."""

    @intrinsic
    def add_product(  # type: ignore[no-untyped-def]
        context, codes, x, scales, out, pitch, groups, inputs, outputs, far, group, middle, factor
    ):
        def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            _Product(width, block, builder, arguments).write()
            return context.get_dummy_value()

        return types.none(*[types.int64] * 10, types.float32, types.float32), build

    return add_product
