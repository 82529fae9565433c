"""What a cache does for draft trees: one pass appends a whole tree, then only the accepted path stays.

The nodes of a tree are appended in flattened order, parents before children, so the tokens of a path are
spread among those of other branches; `keep` closes the gaps. `Cache.crop` only cuts off the end, and its
argument changed its meaning between versions of transformers, so it is not used.

Not covered: windows (a rejected node pushes out a token that is still needed), recurrent states, static
caches; `require_trees` refuses them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, QuantizedCache

from strop.core.cache import IMPLEMENTATION, AttendingLayer
from strop.core.errors import StropError


def tree_mask(ancestors: Tensor, seen: int, dtype: torch.dtype, implementation: str) -> Tensor:
    """The mask of a tree behind `seen` tokens, all of which every node reads: `[1, 1, n, seen + n]`.

    `ancestors` `[n, n]` bool: which nodes a node reads, itself included. The mask is bool; eager attention
    adds it to the scores, so there it is zeros and the lowest number of `dtype`. Raises StropError for an
    `implementation` that takes no such masks.
    """
    if implementation not in (IMPLEMENTATION, "sdpa", "eager"):
        raise StropError(
            f"{implementation} attention cannot read a draft tree: load the model with "
            "attn_implementation='sdpa', or call strop.kv.attach(model)"
        )
    past = ancestors.new_ones(len(ancestors), seen)
    visible = torch.cat([past, ancestors], dim=1)[None, None]
    if implementation != "eager":
        return visible
    return (~visible).to(dtype) * torch.finfo(dtype).min


def require_trees(cache: Cache) -> None:
    """Raise StropError when `keep` cannot serve the cache, saying why."""
    if isinstance(cache, QuantizedCache):
        _refuse("transformers' quantized cache may round drafts together with the text")
    for layer in cache.layers:
        if isinstance(layer, AttendingLayer):
            if not layer.is_croppable:
                _refuse(
                    "a cache that evicts may drop tokens on the strength of drafts that are then rejected"
                )
        elif getattr(layer, "is_sliding", False):
            _refuse("a layer with a sliding window forgets a token of the text for every draft it reads")
        elif type(layer) is not DynamicLayer:
            _refuse(f"a {type(layer).__name__} cannot take back what it has read")


def _refuse(reason: str) -> None:
    raise StropError(f"{reason}, so draft trees cannot run over this cache: decode without drafts")


def most_rollback(cache: Cache) -> int | None:
    """Most nodes behind the root that a tree may have over this cache; None: no limit.

    Raises StropError as `require_trees` does.
    """
    require_trees(cache)
    limits = [layer.max_rollback for layer in cache.layers if isinstance(layer, AttendingLayer)]
    return min(limits, default=None)


def most_depth(cache: Cache) -> int | None:
    """Depth down to which a tree's nodes read just what plain decoding would; None: any.

    A lossy cache codes tokens as they fall due, and nothing falls due within a tree: deeper nodes still read
    some tokens exactly.
    """
    return min((layer.steady for layer in cache.layers if isinstance(layer, AttendingLayer)), default=None)


def keep(cache: Cache, appended: int, kept: Sequence[int]) -> None:
    """Of the newest `appended` tokens keep those at `kept`, which are the root, 0, and increasing indices.

    Nothing of that forward pass can be taken back afterwards. Raises StropError, and changes nothing, when
    the cache cannot serve trees, or not of so many tokens; ValueError when `kept` is no path.
    """
    require_trees(cache)
    path, seen = list(kept), cache.get_seq_length()
    if path[:1] != [0] or path != sorted(set(path)) or not path[-1] < appended <= seen:
        raise ValueError(f"{path} are not the indices of a path among {appended} tokens")
    for layer in cache.layers:
        if isinstance(layer, AttendingLayer):
            layer.keep(appended, path)
        elif isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            layer.keys = keep_path(layer.keys, appended, path)
            layer.values = keep_path(layer.values, appended, path)


def keep_path(held: Tensor, appended: int, kept: list[int]) -> Tensor:
    """Tokens `[B, H_kv, n, D]`, of whose newest `appended` only those at `kept` stay; moved in place."""
    start = held.shape[2] - appended
    stay = next((i for i, index in enumerate(kept) if i != index), len(kept))
    if moving := kept[stay:]:
        with torch.inference_mode():
            found = held[:, :, torch.tensor(moving, device=held.device) + start]
            held[:, :, start + stay : start + len(kept)] = found
    return held[:, :, : start + len(kept)]
