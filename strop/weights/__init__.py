"""Weight quantization: the `weights` slot, which saves bits."""

from strop.weights.base import WeightMethod
from strop.weights.rtn import RTN

__all__ = ["RTN", "WeightMethod"]
