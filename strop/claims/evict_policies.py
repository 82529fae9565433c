"""The eviction policies that are compared, and the controls that exist for comparison alone.

What is random gets a seed a repetition, so that an interval over repetitions covers chance as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PretrainedConfig

from strop.core.attention import attend_plain, group_queries
from strop.core.cache import KVCache
from strop.core.sampling import key_words
from strop.kernels.evict import kernels
from strop.kv import RKV, CurDKV, EvictLarge, RandomEviction, SnapKV, StreamingLLM, VaSE, VaSEDKV
from strop.kv.evicting import Candidates, EvictingKV, EvictingLayer
from strop.kv.slot_store import SlotStore

ATTN_V, DKV, SNAP, R_KV, CUR = "AttnV", "DKV", "SnapKV", "R-KV", "CurDKV"
STREAMING, RANDOM, EVICT_LARGE = "StreamingLLM", "random", "evict-large"
SAMPLED, RANKED, RESERVED = "SnapKV + sampling", "AttnV ranked", "random-reserved"
POLICIES = (ATTN_V, DKV, SNAP, R_KV, CUR, STREAMING, RANDOM, EVICT_LARGE, SAMPLED, RANKED, RESERVED)
"""Every policy; the last three are VaSE-AttnV with no reserve, without chance, and with a reserve by lot."""
SELECTION = "selection"


def policies(budget: int, buffer: int, repetitions: int) -> dict[str, EvictingKV]:
    """Every policy by name, for batches of so many repetitions of equally many rows, side by side."""
    size = {"budget": budget, "buffer": buffer}

    def drawn(kind: partial | type[EvictingKV]) -> EvictingKV:
        return Seeded(**size, methods=tuple(kind(**size, seed=seed) for seed in range(repetitions)))

    return {
        ATTN_V: drawn(VaSE),
        DKV: drawn(VaSEDKV),
        SNAP: SnapKV(**size),
        R_KV: RKV(**size),
        CUR: drawn(CurDKV),
        STREAMING: StreamingLLM(**size),
        RANDOM: drawn(RandomEviction),
        EVICT_LARGE: EvictLarge(**size),
        SAMPLED: drawn(partial(VaSE, sinks=0, reserve=0)),
        RANKED: VaSE(**size, sampler="none"),
        RESERVED: drawn(RandomReserved),
    }


@dataclass(frozen=True, kw_only=True)
class Seeded(EvictingKV):
    """One policy under several seeds, each for its part of the batch."""

    methods: Sequence[EvictingKV]

    @property
    def window(self) -> int:
        return self.methods[0].window

    def scores(self, candidates: Candidates) -> Tensor:
        parts = split(candidates, len(self.methods))
        return torch.cat([method.scores(part) for method, part in zip(self.methods, parts, strict=True)])


def split(candidates: Candidates, parts: int) -> list[Candidates]:
    """Candidates of equal parts of the batch, in order."""
    chunks = [x.chunk(parts) if isinstance(x, Tensor) else [x] * parts for x in candidates]
    return [Candidates(*part) for part in zip(*chunks, strict=True)]


@dataclass(frozen=True, kw_only=True)
class RandomReserved(VaSE):
    """VaSE whose reserved places go by a lot that every token draws once, whatever its value."""

    def scores(self, candidates: Candidates) -> Tensor:
        places = candidates.positions
        words = key_words(self.seed, "reserve", candidates.layer)
        lots = kernels(places.device.type).gumbel(torch.zeros_like(places).float(), places, *words).exp()
        return super().scores(candidates._replace(values=torch.stack([torch.zeros_like(lots), lots], -1)))


# Selection with the full cache.


@dataclass(frozen=True, kw_only=True)
class Selection(EvictingKV):
    """Keep every token, and let each step attend to the `budget` that its own queries look at most.

    The newest `buffer` come on top. What to attend to is read off the exact attention over all keys, which
    saves neither memory nor reading: a ceiling, not a method. For rows without padding.
    """

    def scores(self, candidates: Candidates) -> Tensor:
        raise NotImplementedError("selection drops nothing")

    def new_cache(self, config: PretrainedConfig) -> KVCache:
        return KVCache(config, self, lambda decoder: _SelectingLayer(decoder, self, 0))


class _SelectingLayer(EvictingLayer):
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.store = _SelectingStore(self.method.budget, self.method.buffer, key_states, value_states)
        self.is_initialized = True


class _SelectingStore(SlotStore):
    @property
    def due(self) -> Tensor:
        return torch.zeros_like(self.length, dtype=torch.bool)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        end, old = self.columns, self.columns - self.buffer
        if query.shape[2] > 1 or old <= self.budget:
            return super().attend(query, mask, scaling, softcap)
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        scores = group_queries(query, keys.shape[1]) @ keys.float().transpose(-1, -2) * scaling
        mass = scores.softmax(-1).mean(2, keepdim=True)
        chosen = torch.zeros_like(mass, dtype=torch.bool)
        chosen.scatter_(-1, mass[..., :old].topk(self.budget).indices, True)[..., old:] = True
        return attend_plain(query, keys, values, chosen.repeat_interleave(scores.shape[2], 1), scaling)
