"""Keep, code, place, reuse and select keys and values."""

from strop.core.cache import attach
from strop.kv.base import KVMethod
from strop.kv.curdkv import CurDKV
from strop.kv.documents import DocumentStore
from strop.kv.evict_large import EvictLarge
from strop.kv.hadamard_rtn import HadamardRTN
from strop.kv.kivi import KIVI
from strop.kv.kvarn import KVarN
from strop.kv.press import Press
from strop.kv.random_eviction import RandomEviction
from strop.kv.rkv import RKV
from strop.kv.saved import load_cache, save_cache
from strop.kv.segments import SegmentCache
from strop.kv.snapkv import SnapKV
from strop.kv.stock import Quantized
from strop.kv.streaming import StreamingLLM
from strop.kv.vase import VaSE, VaSEDKV

__all__ = [
    "KIVI",
    "RKV",
    "CurDKV",
    "DocumentStore",
    "EvictLarge",
    "HadamardRTN",
    "KVMethod",
    "KVarN",
    "Press",
    "Quantized",
    "RandomEviction",
    "SegmentCache",
    "SnapKV",
    "StreamingLLM",
    "VaSE",
    "VaSEDKV",
    "attach",
    "load_cache",
    "save_cache",
]
