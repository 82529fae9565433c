"""The target as speculation sees it: it reads a text, scores trees behind it, and keeps accepted paths."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from strop.core.compact import keep, most_depth, most_rollback, tree_mask
from strop.core.errors import StropError
from strop.core.hooks import decoder_layers, outputs_of
from strop.decode.tree import DraftTree, binary, chained

CLOSE = 0.02
"""By how much a logit may differ, relative to the largest, between two ways to compute the same."""


class Target:
    """A causal language model with a cache, and the features of what it read last."""

    def __init__(self, model: PreTrainedModel, cache: Cache, taps: Sequence[Tensor]) -> None:
        """`taps` is the list that `tapped` fills. Raises StropError for a cache that cannot take trees."""
        self.model, self.cache, self.taps = model, cache, taps
        limit = most_rollback(cache)
        self.most = 1 << 30 if limit is None else limit

    @property
    def seen(self) -> int:
        """Tokens read, s."""
        return self.cache.get_seq_length()

    @property
    def depth(self) -> int:
        """Depth down to which a tree reads just what plain decoding would."""
        limit = most_depth(self.cache)
        return 1 << 30 if limit is None else limit

    @property
    def features(self) -> Tensor | None:
        """Tapped outputs of the newest tokens, `[n, k * d]`; None without taps."""
        return torch.cat([tap[0] for tap in self.taps], dim=-1) if self.taps else None

    def read(self, ids: Tensor) -> Tensor:
        """Read the text `ids` `[1, T]`; logits `[1, V]` behind it."""
        places = torch.arange(self.seen, self.seen + ids.shape[1], device=ids.device)[None]
        out = self.model(
            input_ids=ids,
            position_ids=places,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[0, -1:]

    def score(self, tree: DraftTree) -> Tensor:
        """Logits `[n + 1, V]` behind every node of a tree, whose nodes are appended to the cache."""
        device, seen = self.model.device, self.seen
        mask = tree_mask(
            tree.ancestor_mask().to(device), seen, self.model.dtype, self.model.config._attn_implementation
        )
        out = self.model(
            input_ids=torch.tensor([tree.token], device=device),
            attention_mask=mask,
            position_ids=torch.tensor([tree.depth], device=device) + seen,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.logits[0]

    def keep(self, appended: int, path: Sequence[int]) -> None:
        """Of the `appended` nodes scored last keep those on a path."""
        keep(self.cache, appended, path)


@contextmanager
def tapped(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """While open, the list holds the newest outputs of some layers of the model, `[B, n, d]` each."""
    blocks = decoder_layers(model) if layers else []
    with outputs_of([blocks[layer] for layer in layers]) as taps:
        yield taps


def require_target(model: PreTrainedModel) -> None:
    """Raise StropError unless the model reads trees by 4-D masks and position ids.

    A tree of two branches is scored: neither may see the other, and each must stand where it says.
    """
    name = type(model).__name__
    if "position_ids" not in signature(model.forward).parameters:
        raise StropError(
            f"{name} takes no position ids, so it cannot read draft trees: decode without drafts"
        )
    if "local" in (getattr(model.config, "attention_layers", None) or ()):  # GPT-Neo's, inside its attention
        raise StropError(f"{name} has windows that count drafts as text: decode without drafts")
    a, b, c, d, e = (token % model.get_input_embeddings().weight.shape[0] for token in range(5))
    alone, beside = chained([a, b, c]), [binary([a, b, other, c]) for other in (d, e)]
    caches = [DynamicCache(config=model.config) for _ in range(3)]
    try:
        behind = [
            Target(model, cache, []).score(tree)[-1].float()
            for cache, tree in zip(caches, (alone, *beside), strict=True)
        ]
    except StropError:
        raise
    except Exception as error:  # models raise many kinds for a mask of a form they do not know
        raise StropError(
            f"{name} cannot read a draft tree's mask ({type(error).__name__}): decode without drafts"
        ) from error
    if any((logits - behind[0]).abs().max() > CLOSE * behind[0].abs().max() for logits in behind):
        raise StropError(f"{name} does not heed a draft tree's mask and positions: decode without drafts")
