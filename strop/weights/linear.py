"""A linear layer whose weights are stored as packed integer codes and per-group scales.

The matrix is rebuilt at every forward pass, so this layer saves memory and not time. Left out: zero
points (codes lie symmetrically around zero) and kernels that multiply by the codes directly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strop.core.bits import pack, unpack


class PackedLinear(nn.Module):
    """Stands in for an `nn.Linear` `[O, I]` and takes `O * I * bits / 8` bytes, and the scales.

    `codes` is `[O, I]` uint8, where code `c` means the integer `c - 2**(bits - 1)`; `scale` is
    `[O, I / group]` in the model's dtype; `bias` is `[O]` or None. Raises ValueError if one row of
    codes does not fill whole bytes.
    """

    packed: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, codes: Tensor, scale: Tensor, bits: int, bias: nn.Parameter | None = None):
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.bits = bits
        self.group = self.in_features // scale.shape[-1]
        self.register_buffer("packed", pack(codes, bits))
        self.register_buffer("scale", scale)
        self.register_parameter("bias", bias)

    @property
    def integers(self) -> Tensor:
        """The signed integers `[O, I]` int8, unpacked at every access."""
        codes = unpack(self.packed, self.bits)
        return (codes - 2 ** (self.bits - 1)).view(torch.int8)

    @property
    def weight(self) -> Tensor:
        """The dense matrix `[O, I]` in the dtype of `scale`, rebuilt at every access."""
        grouped = self.integers.to(self.scale.dtype).unflatten(-1, (-1, self.group))
        return grouped.mul_(self.scale.unsqueeze(-1)).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., I]` to `[..., O]`."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}, group={self.group}, bias={self.bias is not None}"
        )


class PackedConv1D(PackedLinear):
    """A `PackedLinear` in the place of GPT-2's `Conv1D`; compressed-tensors has no name for it."""
