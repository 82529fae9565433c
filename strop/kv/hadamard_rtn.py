"""Hadamard + RTN: rotate channels, then round as KIVI does.

What QuaRot does to a KV cache (arXiv 2404.00456), and KVarN's second baseline. Rotation spreads channel
outliers; it leaves differences between tokens as they are.
"""

from dataclasses import dataclass

from strop.kv.codec import RoundedKV, RowCodec


@dataclass(frozen=True, kw_only=True)
class HadamardRTN(RoundedKV):
    """KV cache in rotated, rounded tiles."""

    def codec(self) -> RowCodec:
        return RowCodec(self.bits_k, self.bits_v, self.group, rotation=True, aux_dtype=self.aux_dtype)
