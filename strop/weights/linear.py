"""A linear layer whose weights are stored as packed integer codes, scales and zeros.

Few rows are multiplied by the codes directly (`strop.kernels.linear`), with weights as the codes say, in
float32. For more rows the matrix is rebuilt at every pass, in the dtype of the scales. Left out: a kernel for
GPUs, where the matrix is always rebuilt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strop.core.bits import pack, unpack
from strop.kernels.linear import serving
from strop.weights.grid import Codes, Grid, dequantize


class PackedLinear(nn.Module):
    """Stands in for an `nn.Linear` `[O, I]` and takes `O * I * bits / 8` bytes, the scales and the zeros.

    `bias` is `[O]` or None. Raises ValueError if one row of codes does not fill whole bytes.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, quantized: Codes, grid: Grid, bias: nn.Parameter | None = None):
        super().__init__()
        self.out_features, self.in_features = quantized.codes.shape
        self.grid = grid
        self.register_buffer("packed", pack(quantized.codes, grid.bits))
        self.register_buffer("scale", quantized.scale)
        self.register_buffer("zero", quantized.zero)
        self.register_parameter("bias", bias)

    @classmethod
    def empty(cls, layer: nn.Module, grid: Grid) -> "PackedLinear":
        """The packed form of a linear layer on the meta device, its tensors yet to be loaded."""
        outputs, inputs = matrix(layer).shape
        groups = (outputs, inputs // grid.width(inputs))
        with torch.device("meta"):
            scale = torch.empty(groups, dtype=layer.weight.dtype)
            zero = None if grid.symmetric else torch.empty(groups, dtype=layer.weight.dtype)
            return cls(Codes(torch.empty(outputs, inputs, dtype=torch.uint8), scale, zero), grid, layer.bias)

    @property
    def codes(self) -> Tensor:
        """The codes `[O, I]` uint8, unpacked at every access."""
        return unpack(self.packed, self.grid.bits)

    @property
    def weight(self) -> Tensor:
        """The dense matrix `[O, I]` in the dtype of `scale`, rebuilt at every access."""
        return dequantize(self.codes, self.scale, self.grid.middle if self.zero is None else self.zero)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., I]` to `[..., O]`."""
        held, bias = self._buffers, self._parameters["bias"]
        packed, scale = held["packed"], held["scale"]
        if (kernels := serving(x, packed, scale, bias, self.grid.bits)) is None:
            return F.linear(x, self.weight, bias)
        return kernels.multiply(x, packed, scale, held["zero"], bias, self.grid.bits)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, {self.grid}, bias={self.bias is not None}"


class PackedConv1D(PackedLinear):
    """A `PackedLinear` in the place of GPT-2's `Conv1D`; compressed-tensors has no name for it."""


def matrix(layer: nn.Module) -> Tensor:
    """A linear layer's weight as contiguous `[O, I]`; `Conv1D` keeps it transposed."""
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    return weight.detach().contiguous()
