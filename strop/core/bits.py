"""Small unsigned integers packed into bytes, lowest bits first. Every packed tensor in strop uses this."""

import torch
from torch import Tensor

WIDTHS = (1, 2, 4, 8)
_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
"""For each width the integer that holds the codes of one byte, a byte each."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take; `count` must fill whole bytes."""
    if bits not in WIDTHS:
        raise ValueError(f"bits must be one of {WIDTHS}, got {bits}")
    if count * bits % 8:
        raise ValueError(f"{count} codes of {bits} bits do not fill whole bytes")
    return count * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes `[..., n]` uint8, each below 2**bits, into `[..., n * bits / 8]` uint8."""
    packed_bytes(codes.shape[-1], bits)
    if bits == 8:
        return codes
    lanes = codes.unflatten(-1, (-1, 8 // bits))
    packed = lanes[..., 0].clone()
    for lane in range(1, 8 // bits):
        packed |= lanes[..., lane] << (lane * bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Invert `pack`: `[..., m]` uint8 to codes `[..., m * 8 / bits]` uint8.

    Each byte is widened to a word of as many bytes as it has codes, whose fields are then spread by halving:
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
