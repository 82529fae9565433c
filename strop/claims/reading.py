"""Reading texts through a coded cache, with the damage fed back or held out of the loop.

Accumulated (pseudo-decode): a text is read in blocks; every block writes keys and values that earlier damage
has already bent, and those are coded in turn. Static: the keys and values are those of an undamaged run,
coded once; only what is read from them is damaged, nothing is fed back.

Tiles are held as their codec decodes them and read by plain attention, so that all rivals share one kernel,
an identity codec changes no bit, and a text costs what a dense cache costs. Which tokens are coded when is
the rule of `strop.kv.tiled`, for rows of equal length. Not covered: padding, sliding windows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from strop.core.errors import StropError
from strop.kv.codec import RoundedKV, RowCodec
from strop.kv.kvarn import varn
from strop.kv.tiled import TileCodec, TiledKV

BLOCK = 64
"""Tokens per step of pseudo-decode."""


@dataclass(frozen=True, kw_only=True)
class VarN(RoundedKV):
    """Balancing without rotation: KVarN's ablation."""

    def codec(self) -> RowCodec:
        return RowCodec(self.bits_k, self.bits_v, self.group, False, varn, self.aux_dtype)


@dataclass(frozen=True)
class Identity(TileCodec):
    """Stores tiles as they are: what it costs must be exactly nothing."""

    group: int = 128

    def check_dim(self, dim: int) -> None:
        """Any head size will do."""

    def record_bytes(self, dim: int) -> int:
        return 2 * self.group * dim * 4

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        return torch.stack([keys, values], -3).float().flatten(-3).view(torch.uint8)

    def decode(self, records: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        tiles = records.view(torch.float32).unflatten(-1, (2, self.group, dim))
        return tiles[..., 0, :, :], tiles[..., 1, :, :]

    def scores(self, query: Tensor, records: Tensor) -> Tensor:
        raise NotImplementedError("the control is read densely")

    def accumulate(self, weights: Tensor, records: Tensor, dim: int) -> Tensor:
        raise NotImplementedError("the control is read densely")


@dataclass(frozen=True, kw_only=True)
class Uncoded(TiledKV):
    """A tiled cache whose codec changes nothing: the control."""

    def codec(self) -> Identity:
        return Identity(self.group)


class CodedLayer(DynamicLayer):
    """Keys and values `[B, H_kv, T, D]` held densely; a tile becomes what its codec makes of it when it is due."""

    def __init__(self, method: TiledKV, source: tuple[Tensor, Tensor] | None = None) -> None:
        """`source`: keys and values of an undamaged run `[B, H_kv, T, D]`, held instead of what arrives."""
        super().__init__()
        self.method, self.codec, self.source = method, method.codec(), source
        self.seen = self.tiles = self.revocable = 0

    def get_seq_length(self) -> int:
        return self.seen

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Code what is due, append the newest tokens, and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._settle()
        begin, self.seen = self.seen, self.seen + key_states.shape[2]
        self.revocable = min(key_states.shape[2] - 1, self.method.max_rollback)
        if self.source is not None:
            key_states, value_states = (x[:, :, begin : self.seen] for x in self.source)
        if self.seen > self.keys.shape[2]:
            self._grow(key_states)
        self.keys[:, :, begin : self.seen] = key_states
        self.values[:, :, begin : self.seen] = value_states
        return self.keys[:, :, : self.seen], self.values[:, :, : self.seen]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def _grow(self, like: Tensor) -> None:
        batch, heads, _, dim = like.shape
        room = like.new_empty(batch, heads, max(self.seen, 512, self.seen * 5 // 4), dim)
        held = self.keys.shape[2]
        grown = []
        for old in (self.keys, self.values):
            grown.append(room.clone())
            grown[-1][:, :, :held] = old
        self.keys, self.values = grown

    def _settle(self) -> None:
        """Code every tile that is full and lies behind the tail and what may be taken back."""
        group, sinks = self.method.group, self.method.sinks
        tiles = max((self.seen - self.revocable - sinks - self.method.tail) // group + 1, 0)
        if tiles <= self.tiles:
            return
        span = slice(sinks + self.tiles * group, sinks + tiles * group)
        keys, values = (x[:, :, span].unflatten(2, (-1, group)) for x in (self.keys, self.values))
        decoded = self.codec.decode(self.codec.encode(keys, values), keys.shape[-1])
        self.keys[:, :, span], self.values[:, :, span] = (x.flatten(2, 3).to(self.keys.dtype) for x in decoded)
        self.tiles = tiles


def coded_cache(model: PreTrainedModel, method: TiledKV, source: Cache | None = None) -> Cache:
    """A cache that codes as `method` does; static when `source` is the cache of an undamaged run."""
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        raise StropError("claims about KV codecs need a model with full attention in every layer")
    count = model.config.num_hidden_layers
    sources: Sequence[Any] = [None] * count
    if source is not None:
        sources = [(layer.keys, layer.values) for layer in source.layers]
    return Cache(layers=[CodedLayer(method, held) for held in sources])


@torch.no_grad()
def pseudo_decode(model: PreTrainedModel, tokens: Tensor, cache: Cache, block: int = BLOCK) -> Iterator[Tensor]:
    """Logits `[B, b, V]` float32 of texts `[B, T]`, block after block, through a cache."""
    for part in tokens.split(block, dim=1):
        yield model(part, past_key_values=cache, use_cache=True).logits.float()


@dataclass(frozen=True)
class Undamaged:
    """Texts as the model reads them without any compression."""

    tokens: Tensor
    """`[B, T]`."""
    cache: Cache
    logits: Tensor
    """`[B, T, V]` float32."""
    loss: Tensor
    """Mean negative log-likelihood of each text `[B]`, nats a token."""


@dataclass(frozen=True)
class Cost:
    """What a cache cost on each text `[B]`, nats a token."""

    kl: Tensor
    """Mean KL divergence from the undamaged distribution."""
    loss: Tensor
    """Mean negative log-likelihood."""


def read_undamaged(model: PreTrainedModel, tokens: Tensor) -> Undamaged:
    """Read texts `[B, T]` through transformers' own cache."""
    cache = DynamicCache(config=model.config)
    logits = torch.cat(list(pseudo_decode(model, tokens, cache)), dim=1)
    return Undamaged(tokens, cache, logits, _loss(logits, tokens, 0).sum(1) / (tokens.shape[1] - 1))


def read(model: PreTrainedModel, base: Undamaged, cache: Cache) -> Cost:
    """Read the same texts through another cache."""
    kl, loss, start = [], [], 0
    for logits in pseudo_decode(model, base.tokens, cache):
        p = base.logits[:, start : start + logits.shape[1]].log_softmax(-1)
        q = logits.log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1).clamp(min=0))
        loss.append(_loss(logits, base.tokens, start))
        start += logits.shape[1]
    return Cost(torch.cat(kl, 1).mean(1), torch.cat(loss, 1).sum(1) / (base.tokens.shape[1] - 1))


def _loss(logits: Tensor, tokens: Tensor, start: int) -> Tensor:
    """Negative log-likelihood of the tokens that follow `logits` `[B, b, V]`, at most `[B, b]`."""
    targets = tokens[:, start + 1 : start + 1 + logits.shape[1]]
    losses = torch.nn.functional.cross_entropy(
        logits[:, : targets.shape[1]].flatten(0, 1), targets.flatten(), reduction="none"
    )
    return losses.view_as(targets)


def check_identity(model: PreTrainedModel, base: Undamaged, method: TiledKV) -> None:
    """Raise unless the identity codec, static, gives the undamaged logits bit for bit."""
    cache = coded_cache(model, method, base.cache)
    logits = torch.cat(list(pseudo_decode(model, base.tokens, cache)), dim=1)
    if not torch.equal(logits, base.logits):
        off = float((logits - base.logits).abs().max())
        raise RuntimeError(f"control failed: an identity codec in static mode changed logits by up to {off}")
