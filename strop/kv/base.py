"""The kv family's contract: a method is a frozen dataclass that makes transformers caches.

`new_cache` is all that `generate` needs; `kv_bytes` says by formula what the cache will hold, metadata,
sinks and tails included, so that a recipe can be judged before it runs.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from strop.core.method import Method


@dataclass(frozen=True)
class KVShape:
    """What decides the size of a cache."""

    layers: int
    """Layers with a full-attention cache, the ones that a kv method replaces."""
    windows: tuple[int, ...]
    """Window of each sliding-window layer; these keep transformers' own storage."""
    heads: int
    """KV heads per layer, H_kv."""
    queries: int
    """Query heads per layer, H_q."""
    dim: int
    """Head size D."""
    itemsize: int
    """Bytes of one element in the model's dtype."""

    @classmethod
    def of(cls, config: PretrainedConfig, itemsize: int = 2) -> "KVShape":
        """Read the shape off a transformers config."""
        decoder = config.get_text_config(decoder=True)
        layers = DynamicCache(config=config).layers
        heads = decoder.num_attention_heads
        return cls(
            layers=sum(type(layer) is DynamicLayer for layer in layers),
            windows=tuple(layer.sliding_window for layer in layers if hasattr(layer, "sliding_window")),
            heads=getattr(decoder, "num_key_value_heads", None) or heads,
            queries=heads,
            dim=getattr(decoder, "head_dim", None) or decoder.hidden_size // heads,
            itemsize=itemsize,
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in one layer, uncompressed."""
        return 2 * self.heads * self.dim * self.itemsize

    def dense_bytes(self, tokens: int) -> int:
        """Bytes of one sequence without any kv method."""
        return self.layers * tokens * self.token_bytes + self.window_bytes(tokens)

    def window_bytes(self, tokens: int) -> int:
        """Bytes of one sequence in the sliding-window layers."""
        return sum(min(tokens, window) for window in self.windows) * self.token_bytes


class KVMethod(Method, ABC):
    """One way to keep keys and values. Subclasses are frozen dataclasses with the paper's fields."""

    max_rollback: int = 0
    """Most tokens of the last forward pass that a cache can take back, as speculation needs."""

    @abstractmethod
    def new_cache(self, config: PretrainedConfig) -> Cache:
        """An empty cache for a model of this config.

        Raises StropError when the method cannot serve the model, saying why.
        """

    @abstractmethod
    def kv_bytes(self, shape: KVShape, tokens: int) -> int:
        """Bytes of one sequence of `tokens` tokens, all layers, by formula."""
