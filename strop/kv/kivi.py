"""KIVI: round keys per channel and values per token, without rotation or balancing.

The common ancestor of tile codecs and KVarN's first baseline (arXiv 2402.02750). Here on the same storage as
KVarN, with the same sinks and tail, so that the two differ in the codec alone; the original keeps no sinks.
"""

from dataclasses import dataclass

from strop.kv.codec import RoundedKV, RowCodec


@dataclass(frozen=True, kw_only=True)
class KIVI(RoundedKV):
    """KV cache in plainly rounded tiles."""

    def codec(self) -> RowCodec:
        return RowCodec(self.bits_k, self.bits_v, self.group, rotation=False, aux_dtype=self.aux_dtype)
