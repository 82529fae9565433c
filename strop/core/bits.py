"""Small unsigned integers packed into bytes, lowest bits first. Every packed tensor in strop uses this.

A width that does not divide a byte is packed as planes whose widths do: 3 bits are the low two of every code,
then the high one of every code.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

WIDTHS = range(1, 9)
BYTE_WIDTHS = (1, 2, 4, 8)
"""Widths that divide a byte, so that a code lies in one piece."""
_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
"""For each width the integer that holds the codes of one byte, a byte each."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take; `count` must fill whole bytes in every plane."""
    if bits not in WIDTHS:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    if any(count * width % 8 for width, _ in planes(bits)):
        raise ValueError(f"{count} codes of {bits} bits do not fill whole bytes")
    return count * bits // 8


def planes(bits: int) -> Iterator[tuple[int, int]]:
    """The planes of a code of 1 to 8 bits, `(width, lowest bit)` each: 7 is 4 bits, then 2, then 1."""
    place = 0
    for width in reversed(BYTE_WIDTHS):
        if bits & width:
            yield width, place
            place += width


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes `[..., n]` uint8, each below 2**bits, into `[..., n * bits / 8]` uint8."""
    packed_bytes(codes.shape[-1], bits)
    if bits in BYTE_WIDTHS:
        return _pack_plane(codes, bits)
    parts = [_pack_plane((codes >> place).bitwise_and_(2**width - 1), width) for width, place in planes(bits)]
    return torch.cat(parts, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Invert `pack`: `[..., m]` uint8 to codes `[..., m * 8 / bits]` uint8."""
    if bits in BYTE_WIDTHS:
        return _unpack_plane(packed, bits)
    count = packed.shape[-1] * 8 // bits
    parts = packed.split([count * width // 8 for width, _ in planes(bits)], -1)
    codes, *rest = (
        _unpack_plane(part, width) << place for part, (width, place) in zip(parts, planes(bits), strict=True)
    )
    for part in rest:
        codes |= part
    return codes


def _pack_plane(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    lanes = codes.unflatten(-1, (-1, 8 // bits))
    packed = lanes[..., 0].clone()
    for lane in range(1, 8 // bits):
        packed |= lanes[..., lane] << (lane * bits)
    return packed


def _unpack_plane(packed: Tensor, bits: int) -> Tensor:
    """Each byte is widened to a word of a byte a code, whose fields are then spread by halving:
    the upper half of every field moves up until each code has a byte of its own (little-endian machines).
    """
    if bits == 8:
        return packed
    words = packed.new_empty(packed.shape, dtype=_WORDS[bits]).copy_(packed)
    width, spacing, size = 8, 64 // bits, 64 // bits
    while width > bits:
        width, spacing = width // 2, spacing // 2
        fields = sum((2**width - 1) << place for place in range(0, size, spacing))
        words |= words << (spacing - width)
        words &= fields
    return words.view(torch.uint8)
