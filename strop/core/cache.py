"""The bridge between a cache that owns its storage and a stock transformers model.

A cache layer's `update` sees keys and values but no queries or mask; the attention function sees queries
and mask but no cache. So when the model's attention implementation is `strop`, `update` returns a handle
in place of the keys, and the attention function registered under that name finds the handle and calls
`layer.attend`. Under any other implementation the layer hands out dense keys and values: correct, not fused.

Not covered: attention sinks as learned logits (`s_aux`), position biases, paged caches; they are refused.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from strop.core.attention import attend_dense, causal, group_queries, ungroup
from strop.core.errors import StropError
from strop.core.method import Method

IMPLEMENTATION = "strop"


class Ref:
    """What stands where attention expects keys and values: a handle on the layer that holds them."""

    def __init__(self, layer: "AttendingLayer") -> None:
        self.layer = layer


class AttendingLayer(CacheLayerMixin):
    """A cache layer that stores keys and values its own way and computes attention over them.

    A subclass owns the abstract methods and the batch operations of transformers' cache layers. Positions
    are columns of the padded batch: column c holds the c-th token of every row, pads included.
    """

    is_sliding = False
    is_croppable = True
    max_rollback = 0
    """Most tokens of the last forward pass that can be taken back."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config

    @property
    @abstractmethod
    def seen(self) -> int:
        """Columns so far, T."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take the newest tokens' keys and values `[B, H_kv, q, D]`."""

    @abstractmethod
    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        """Attention of the newest q tokens over everything held.

        `query` `[B, H_q, q, D]`; `mask` bool `[B, 1 or H_q, q, T]` over true columns, or None for plain
        causal attention without padding. Returns `[B, q, H_q, D]` in the query's dtype.
        """

    @abstractmethod
    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values as the model would see them, `[B, H_kv, T, D]` each, in true columns."""

    @abstractmethod
    def settle(self) -> None:
        """Compact what no later step will need as it is; called on the plain path before an append."""

    def commit(self) -> None:
        """Compact as if nothing of the last forward pass could be taken back any more."""
        self.settle()

    @property
    def steady(self) -> int:
        """Tokens after the next that plain decoding reads before it compacts anything."""
        return 0

    def keep(self, appended: int, kept: list[int]) -> None:
        """Of the newest `appended` tokens keep those at `kept`, the first among them, and commit.

        Raises StropError, and changes nothing, when so many cannot be taken back.
        """
        raise StropError("this cache cannot take any tokens back: use it without speculation")

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError unless the invariants of what is held are kept."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs to go on from here, by name."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Hold what another layer's `state` says, instead of anything held so far."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        fused = self.config._attn_implementation == IMPLEMENTATION
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif not fused:
            self.settle()
        self.append(key_states, value_states)
        return (Ref(self), Ref(self)) if fused else self.dense()

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0


class KVCache(DynamicCache):
    """A transformers cache whose full-attention layers are strop's; sliding-window layers stay stock."""

    def __init__(
        self,
        config: PretrainedConfig,
        method: Method,
        make_layer: Callable[[PretrainedConfig], AttendingLayer],
    ) -> None:
        """A cache that `method` makes.

        Raises StropError when the model has no full-attention layer of keys and values to replace.
        """
        super().__init__(config=config)
        self.config, self.method = config, method
        decoder = config.get_text_config(decoder=True)
        if getattr(decoder, "kv_lora_rank", None) is not None:
            raise StropError(
                "this model caches one latent vector a token instead of keys and values, which no kv method "
                "here can code: leave the kv slot empty"
            )
        self.layers = [make_layer(decoder) if type(layer) is DynamicLayer else layer for layer in self.layers]
        if not self.attending:
            raise StropError(
                "no layer of this model keeps a full-attention cache (all use a sliding window or "
                "carry a state), so a kv method has nothing to work on: leave the kv slot empty"
            )

    @property
    def attending(self) -> list[AttendingLayer]:
        """The layers that strop holds; the rest are transformers' own."""
        return [layer for layer in self.layers if isinstance(layer, AttendingLayer)]

    def check(self) -> None:
        """Raise ValueError unless every layer that strop holds keeps its invariants."""
        for layer in self.attending:
            layer.check()

    def bytes(self) -> int:
        """Bytes of every tensor in the cache, stock layers included."""
        return tensor_bytes(self.layers)


def require(holds: Any, otherwise: str) -> None:
    """Raise ValueError saying what a cache holds `otherwise`; for its `check`."""
    if not holds:
        raise ValueError(f"this cache holds {otherwise}")


def first_real(mask: Tensor | None, first: Tensor, seen: int) -> Tensor:
    """Where each row's first real token is, `[B]` on the host, once the mask of the newest tokens is known.

    `first` says it for rows that had one before, and is `seen` or more for the others. The newest query sees
    all of its row. Raises StropError unless padding is on the left.
    """
    if mask is None or not (unknown := first >= seen - mask.shape[-2]).any():
        return first
    sees = mask[:, 0, -1].cpu().expand(len(first), -1)
    begin = torch.where(sees.any(-1), sees.int().argmax(-1), seen)
    if not (sees.sum(-1) == seen - begin)[unknown].all():
        raise StropError(
            "this batch is padded on the right or in the middle: pad on the left "
            "(tokenizer.padding_side = 'left'), as generation needs"
        )
    return torch.where(unknown, begin, first)


def commit(cache: Cache) -> None:
    """Promise a cache that nothing of the last forward pass will be taken back.

    A layer may hold back what speculation could still reject; one that does has a `commit`.
    """
    for layer in cache.layers:
        if hasattr(layer, "commit"):
            layer.commit()


def tensor_bytes(holder: Any) -> int:
    """Bytes of all distinct tensors reachable from `holder` through containers and attributes.

    Works for any cache: tensor subclasses are opened, shared storage is counted once.
    """
    storages: dict[int, int] = {}
    _collect(holder, storages, set())
    return sum(storages.values())


def _collect(item: Any, storages: dict[int, int], visited: set[int]) -> None:
    if isinstance(item, Tensor) and not hasattr(item, "__tensor_flatten__"):
        storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        return
    if id(item) in visited or isinstance(item, (PretrainedConfig, type)):
        return
    visited.add(id(item))
    if isinstance(item, Tensor):
        names = item.__tensor_flatten__()[0]  # type: ignore[attr-defined]
        children = [getattr(item, name) for name in names]
    elif isinstance(item, dict):
        children = list(item.values())
    elif isinstance(item, (list, tuple)):
        children = list(item)
    else:
        children = list(getattr(item, "__dict__", {}).values())
    for child in children:
        _collect(child, storages, visited)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Ref,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: the layer's own attention if `key` is a handle, else SDPA."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    _require_supported(kwargs, ("position_bias", "s_aux") if isinstance(key, Ref) else ("s_aux",))
    if isinstance(key, Ref):
        return key.layer.attend(query, _boolean(attention_mask), scaling, softcap), None
    if softcap is not None:
        return _capped(query, key, value, _boolean(attention_mask), scaling, softcap), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _require_supported(options: dict[str, Any], refused: Sequence[str]) -> None:
    for name in refused:
        if options.get(name) is not None:
            raise StropError(
                f"this model's attention uses `{name}`, which strop's attention does not: run it with "
                "transformers' own caches and attention"
            )


def _boolean(mask: Tensor | None) -> Tensor | None:
    """A mask as visible or not; transformers' own are boolean, a caller's may be added to scores."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if not (visible | (mask <= torch.finfo(mask.dtype).min / 2)).all():
        raise StropError(
            "this attention mask adds a bias to the scores, which no kv method here supports: "
            "pass a mask of zeros and minus infinity, or leave the kv slot empty"
        )
    return visible


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> Tensor:
    if mask is None:
        columns = torch.arange(key.shape[2], device=key.device).expand(len(key), -1)
        mask = causal(query.shape[2], columns, key.shape[2])
    rows = group_queries(query, key.shape[1])
    return ungroup(attend_dense(rows, key, value, mask, scaling, softcap).out, query)


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Route the model's attention through strop, so that a strop cache attends over its own storage.

    Outputs without a strop cache are those of SDPA. Returns the model. Raises StropError when the
    architecture cannot swap its attention function.
    """
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise StropError(
            f"{type(model).__name__} does not let its attention function be swapped, so strop cannot "
            "work inside it: use an architecture built on transformers' AttentionInterface"
        )
    return model
