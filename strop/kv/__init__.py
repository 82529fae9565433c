"""Keep, code, place, reuse and select keys and values."""

from strop.core.cache import attach
from strop.kv.base import KVMethod
from strop.kv.hadamard_rtn import HadamardRTN
from strop.kv.kivi import KIVI
from strop.kv.kvarn import KVarN
from strop.kv.saved import load_cache, save_cache
from strop.kv.stock import Quantized

__all__ = [
    "KIVI",
    "HadamardRTN",
    "KVMethod",
    "KVarN",
    "Quantized",
    "attach",
    "load_cache",
    "save_cache",
]
