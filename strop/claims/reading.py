"""Reading texts through a coded cache, with the damage fed back or held out of the loop.

Accumulated (pseudo-decode): a text is read in blocks; every block writes keys and values that earlier damage
has already bent, and those are coded in turn. Static: the keys and values are those of an undamaged run,
coded once; only what is read from them is damaged, nothing is fed back.

Tiles are held as their codec decodes them and read by plain attention, so that all rivals share one kernel,
an identity codec changes no bit, and a text costs what a dense cache costs. Which tokens are coded when is
the rule of `strop.kv.tiled`, for rows of equal length. Not covered: padding, sliding windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from strop.audit.quality import pseudo_decode
from strop.core.errors import StropError
from strop.kv.base import KVMethod
from strop.kv.tiled import TiledKV


class CodedLayer(DynamicLayer):
    """Keys and values `[B, H_kv, T, D]` held densely; a tile that is due turns into its decoded self."""

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

    def commit(self) -> None:
        """Nothing of the last forward pass will be taken back."""
        self.revocable = 0

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
        tiles = self.method.tiles(self.seen - self.revocable)
        if tiles <= self.tiles:
            return
        span = slice(sinks + self.tiles * group, sinks + tiles * group)
        keys, values = (x[:, :, span].unflatten(2, (-1, group)) for x in (self.keys, self.values))
        decoded = self.codec.decode(self.codec.encode(keys, values), keys.shape[-1])
        for held, tiles_read in zip((self.keys, self.values), decoded, strict=True):
            held[:, :, span] = tiles_read.flatten(2, 3).to(held.dtype)
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


@dataclass(frozen=True)
class Cost:
    """What a cache cost on each text `[B]`, nats a token."""

    kl: Tensor
    """Mean KL divergence from the undamaged distribution."""
    loss: Tensor
    """Mean negative log-likelihood."""


class Subject:
    """A model, the texts that it reads, and what reading them through each cache has cost so far."""

    def __init__(self, name: str, model: PreTrainedModel, tokens: Tensor) -> None:
        """`tokens` `[B, T]`: one text a repetition."""
        self.name, self.model, self.tokens = name, model, tokens
        self.cache: Cache = DynamicCache(config=model.config)
        self.logits = torch.cat(list(pseudo_decode(model, tokens, self.cache)), dim=1)
        self.loss = self._losses(self.logits, 0).sum(1) / (tokens.shape[1] - 1)
        self._costs: dict[tuple[KVMethod, bool], Cost] = {}

    def cost(self, method: KVMethod, static: bool = False) -> Cost:
        """Read the texts through a method's cache; `static` only for tile codecs."""
        key = (method, static)
        if key not in self._costs:
            self._costs[key] = self._read(self.new_cache(method, static))
        return self._costs[key]

    def new_cache(self, method: KVMethod, static: bool) -> Cache:
        """The cache to read through: coded and dense for tile codecs, the method's own for others."""
        if isinstance(method, TiledKV):
            return coded_cache(self.model, method, self.cache if static else None)
        return method.new_cache(self.model.config)

    def check_identity(self, method: TiledKV) -> None:
        """Raise unless an identity codec, static, gives the undamaged logits bit for bit."""
        logits = torch.cat(list(pseudo_decode(self.model, self.tokens, self.new_cache(method, True))), dim=1)
        if not torch.equal(logits, self.logits):
            off = float((logits - self.logits).abs().max())
            raise RuntimeError(f"control failed on {self.name}: an identity codec moved logits by {off}")

    def _read(self, cache: Cache) -> Cost:
        kl, loss, start = [], [], 0
        for logits in pseudo_decode(self.model, self.tokens, cache):
            p = self.logits[:, start : start + logits.shape[1]].log_softmax(-1)
            kl.append((p.exp() * (p - logits.log_softmax(-1))).sum(-1).clamp(min=0))
            loss.append(self._losses(logits, start))
            start += logits.shape[1]
        return Cost(torch.cat(kl, 1)[:, :-1].mean(1), torch.cat(loss, 1).sum(1) / (self.tokens.shape[1] - 1))

    def _losses(self, logits: Tensor, start: int) -> Tensor:
        """Negative log-likelihood of the tokens that follow `logits` `[B, b, V]`, at most `[B, b]`."""
        targets = self.tokens[:, start + 1 : start + 1 + logits.shape[1]]
        losses = cross_entropy(
            logits[:, : targets.shape[1]].flatten(0, 1), targets.flatten(), reduction="none"
        )
        return losses.view_as(targets)
