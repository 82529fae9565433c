"""transformers' own compressed caches as kv methods, so that they stand beside ours in every table.

`QuantizedCache` re-rounds everything it holds at each flush and rounds the whole prompt at once; its fp8
layer scales per tensor. Nothing here is strop's storage: attention runs on what they hand back.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig, QuantizedCache
from transformers.cache_utils import Cache

from strop.core.errors import StropError
from strop.kv.base import KVMethod, KVShape

BACKENDS = ("hqq", "quanto", "fp8")


@dataclass(frozen=True, kw_only=True)
class Quantized(KVMethod):
    """transformers' QuantizedCache."""

    backend: str = "hqq"
    """Who rounds: "hqq", "quanto" or "fp8"."""
    bits: int = 4
    """Bits of an element: 4 or 2; 8 with fp8."""
    group: int = 64
    """Elements that share a scale and a zero point."""
    tail: int = 128
    """Newest tokens kept in the model's dtype until all are rounded again (`residual_length`)."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {self.backend!r}")
        allowed = (8,) if self.backend == "fp8" else (2, 4)
        if self.bits not in allowed:
            raise ValueError(f"{self.backend} rounds to {allowed} bits, got {self.bits}")
        if self.group < 8 or self.tail < 1:
            raise ValueError(f"group must be at least 8 and tail 1, got {self.group} and {self.tail}")

    def settings(self) -> str:
        return self.spell(f"{self.backend} int{self.bits}", "backend", "bits")

    def new_cache(self, config: PretrainedConfig) -> Cache:
        self._require_whole_groups(KVShape.of(config))
        axis = 1 if self.backend == "hqq" else 0
        options = {
            "nbits": self.bits,
            "axis_key": axis,
            "axis_value": axis,
            "q_group_size": self.group,
            "residual_length": self.tail,
        }
        try:
            if self.backend == "fp8":
                return QuantizedCache("fp8", config)
            return QuantizedCache(self.backend, config, **options)
        except (ImportError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise StropError(f"transformers' {self.backend} cache refuses this model: {reason}") from error

    def _require_whole_groups(self, shape: KVShape) -> None:
        """One token's groups must fill whole bytes, or rounding fails at some lengths in mid-generation."""
        if self.backend == "fp8":
            return
        unit = self.group * (8 // self.bits if self.backend == "hqq" else 1)
        if shape.heads * shape.dim % unit:
            raise StropError(
                f"{self.backend} at {self.bits} bits works on {unit} elements at a time, which do not divide "
                f"{shape.heads} KV heads of size {shape.dim}: use a smaller group"
            )

    def kv_bytes(self, shape: KVShape, tokens: int) -> int:
        """As after a flush, when it holds least: up to `tail` generated tokens wait in the model's dtype."""
        if self.backend == "fp8":
            return shape.layers * (2 * shape.heads * shape.dim * tokens + 8)
        elements = 2 * shape.heads * shape.dim * tokens
        scales = 2 * shape.itemsize * elements // self.group
        return shape.layers * (elements * self.bits // 8 + scales)
