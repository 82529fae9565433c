"""Weight quantization: the `weights` slot, which saves bits."""

from strop.weights.allocate import allocate
from strop.weights.alphaq import AlphaQ
from strop.weights.base import WeightMethod
from strop.weights.gptq import GPTQ
from strop.weights.hqq import HQQ
from strop.weights.packed import register
from strop.weights.plan import BitPlan
from strop.weights.pmq import PMQ
from strop.weights.rtn import RTN
from strop.weights.spectrum import spectral_alpha

__all__ = [
    "GPTQ",
    "HQQ",
    "PMQ",
    "RTN",
    "AlphaQ",
    "BitPlan",
    "WeightMethod",
    "allocate",
    "register",
    "spectral_alpha",
]
