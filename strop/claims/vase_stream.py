"""A made-up stream of attention in which it is known what a policy ought to keep, and what each one loses.

One head. Ordinary queries follow a topic that drifts, so that recent tokens serve them. A few tokens, the
critical ones, have keys of their own and values some times larger, and one of them is recalled now and then,
long after anything else has looked at it (arXiv 2606.03928, section 3). The outliers are planted: that large
values mark what is recalled is assumed here, and what follows from it is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import LlamaConfig

from strop.claims.base import Row
from strop.claims.evict_policies import policies
from strop.core.attention import attend_plain
from strop.core.cache import IMPLEMENTATION
from strop.kv.evicting import EvictingKV


@dataclass(frozen=True, kw_only=True)
class StreamSize:
    """How long a stream is and what is planted into it."""

    tokens: int = 3000
    dim: int = 64
    budget: int = 256
    buffer: int = 32
    critical: float = 0.03
    """Share of tokens that are critical."""
    factor: float = 8.0
    """How much larger their values are."""
    recall: float = 1 / 48
    """Chance that a query recalls one of them, each as likely."""
    drift: int = 100
    """Tokens from one topic to the next."""
    sharpness: float = 12.0
    """Logit of a query and the key it points at."""


class Stream(NamedTuple):
    """A stream for each seed, S of them."""

    queries: Tensor
    """`[S, 1, T, D]`, of length 1; a step's query reads its own token, too."""
    keys: Tensor
    """`[S, 1, T, D]`, of length 1."""
    values: Tensor
    """`[S, 1, T, D]`."""
    critical: Tensor
    """Which tokens are, `[S, T]`."""
    recalls: Tensor
    """Which queries recall one, `[S, T]`."""


def make(size: StreamSize, seeds: int) -> Stream:
    """Streams of seeds 0, 1, ..."""
    made = [_make(size, torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    return Stream(*(torch.stack(parts) for parts in zip(*made, strict=True)))


def _make(size: StreamSize, draw: torch.Generator) -> Stream:
    shape = size.tokens, size.dim
    anchors = torch.randn(size.tokens // size.drift + 2, size.dim, generator=draw)
    drifting = interpolate(anchors.T[None], size=size.tokens, mode="linear", align_corners=True)
    topics = normalize(drifting[0].T, dim=-1)
    noise, own, values = (torch.randn(shape, generator=draw) for _ in range(3))
    chance = torch.rand(3, size.tokens, generator=draw)
    critical = chance[0] < size.critical
    keys = normalize(torch.where(critical[:, None], own, topics + normalize(noise, dim=-1)), dim=-1)
    before = critical.cumsum(0)
    recalls = (chance[1] < size.recall) & (before > 0)
    recalled = critical.nonzero().flatten()[(chance[2] * before).long()]
    queries = torch.where(recalls[:, None], keys[recalled], topics)
    values = values * torch.where(critical, size.factor, 1.0)[:, None]
    return Stream(queries[None], keys[None], values[None], critical, recalls)


def full_attention(stream: Stream, sharpness: float) -> Tensor:
    """What attention over the whole history gives, `[S, T, D]`."""
    return attend_plain(stream.queries, stream.keys, stream.values, None, sharpness)[:, :, 0]


def decode(stream: Stream, method: EvictingKV, sharpness: float) -> tuple[Tensor, Tensor]:
    """Attention through a method's cache, a token a step, `[S, T, D]`, and what the cache holds after each.

    That is the share of the critical tokens so far, `[S, T]`.
    """
    config = LlamaConfig(num_hidden_layers=1, attn_implementation=IMPLEMENTATION)
    (layer,) = method.new_cache(config).layers
    outputs, shares = [], []
    for step in range(stream.keys.shape[2]):
        now = slice(step, step + 1)
        layer.update(stream.keys[:, :, now], stream.values[:, :, now])
        outputs.append(layer.attend(stream.queries[:, :, now], None, sharpness, None)[:, 0, 0])
        held = torch.stack(list(layer.store.tokens()))[:, 0].long()
        kept = stream.critical.gather(1, held).sum(1)
        shares.append(kept / stream.critical[:, : step + 1].sum(1).clamp(min=1))
    return torch.stack(outputs, 1), torch.stack(shares, 1)


def stream_study(size: StreamSize, seeds: int, step: Callable[[str], None]) -> list[Row]:
    """Every policy on streams with planted outliers, and on the same without: a repetition is a seed."""
    rows = []
    for planted in (True, False):
        stream = make(replace(size, factor=size.factor if planted else 1.0), seeds)
        full = full_attention(stream, size.sharpness)
        for name, method in policies(size.budget, size.buffer, seeds).items():
            step(f"stream{'' if planted else ' without outliers'}: {name}")
            head = {"study": "stream", "outliers": planted, "method": name}
            rows.append(head | losses(stream, full, method, size))
    return rows


def losses(stream: Stream, full: Tensor, method: EvictingKV, size: StreamSize) -> dict[str, list[float]]:
    """What a method loses on each stream, whose full attention gives `full` `[S, T, D]`.

    Errors are relative to the norm of the full output, means over the queries of a kind from the first
    eviction on; `kept` is the mean share of the critical tokens so far that are held.
    """
    out, kept = decode(stream, method, size.sharpness)
    error = (out - full).norm(dim=-1) / full.norm(dim=-1)
    late = torch.arange(size.tokens) >= size.budget + size.buffer
    kinds = {"ordinary": late & ~stream.recalls, "recall": late & stream.recalls}
    means = {
        kind: [float(row[here].mean()) for row, here in zip(error, chosen, strict=True)]
        for kind, chosen in kinds.items()
    }
    return means | {"kept": kept[:, late].mean(1).tolist()}
