"""Small unsigned integers packed into bytes, lowest bits first. Every packed tensor in strop uses this."""

import torch
from torch import Tensor

WIDTHS = (1, 2, 4, 8)


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
    """Invert `pack`: `[..., m]` uint8 to codes `[..., m * 8 / bits]` uint8."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)
