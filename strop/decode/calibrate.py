"""What rounds cost on this machine: measured once for a (model, drafter, cache, device), then kept."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from strop.core.cache import KVCache
from strop.core.errors import StropError
from strop.core.machine import environment
from strop.decode.builder import BestFirst, Grown, TreeBuilder
from strop.decode.checkpoint import fingerprint
from strop.decode.cost import BUCKET, CostModel, Profile, cost_path, profile
from strop.decode.drafter import Drafter
from strop.decode.proposal import Proposal
from strop.decode.rest import Resting
from strop.decode.stop import Throughput
from strop.decode.target import Target, tapped
from strop.decode.tree import binary, chained

Report = Callable[[str, float], None]
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
LARGE = (96, 128, 192, 256, 384, 512, 768, 1024)
"""Sizes that only a GPU may verify at a profit."""
CONTEXTS = (64, 512, 1536)
FEW = 3
"""Tokens that a round injects, about."""
MANY = 64
"""Nodes of the tree by which the host's work is timed."""
WIDTH = 16
"""Candidates a row that a timed drafter gives."""
ROUNDS = 12


@dataclass(frozen=True)
class CostAware:
    """Best-first trees of the size that pays, by the cost of rounds on this machine; none where none does."""

    price: Literal["round", "global"] = "round"

    def bound(self, model: PreTrainedModel, drafter: Drafter, cache: Cache, report: Report) -> TreeBuilder:
        """The builder for a target over caches like `cache`; the cost is measured where it is not known."""
        return Grown(Resting(Throughput(cost_model(model, drafter, cache, report), price=self.price)))


def cost_model(
    model: PreTrainedModel, drafter: Drafter, cache: Cache, report: Report = lambda what, share: None
) -> CostModel:
    """The cost of rounds over caches like `cache`; what no earlier run measured is measured and kept.

    The target's part is measured once for all drafters.
    """
    rig = _Rig(model, drafter, cache)
    return _kept(_place(model, cache, repr(drafter)), lambda: rig.rounds(_target_cost(rig, report)))


def _target_cost(rig: "_Rig", report: Report) -> CostModel:
    def told(what: str, share: float) -> None:
        report(f"timing the model once, {what}", share)

    return _kept(_place(rig.model, rig.like, "target"), lambda: CostModel.fit(rig.profile(told)))


def _kept(path: Path, measure: Callable[[], CostModel]) -> CostModel:
    """The cost model in a file, measured and written where there is none that can be read."""
    if path.exists():
        try:
            return CostModel.load(path)
        except StropError:
            path.unlink(missing_ok=True)
    measured = measure()
    with suppress(StropError):  # a cache folder that cannot be written costs another measurement, no more
        measured.save(path)
    return measured


def kind(cache: Cache) -> str:
    """What distinguishes caches by cost."""
    return repr(cache.method) if isinstance(cache, KVCache) else type(cache).__name__


def _place(model: PreTrainedModel, cache: Cache, part: str) -> Path:
    told = [type(model).__name__, str(model.dtype), str(model.device), model.config._attn_implementation]
    size = sum(parameter.numel() for parameter in model.parameters())
    return cost_path(*told, size, fingerprint(model), part, kind(cache), environment())


class _Rig:
    """A target on random text, whose rounds are timed piece by piece."""

    def __init__(self, model: PreTrainedModel, drafter: Drafter, cache: Cache) -> None:
        self.model, self.drafter, self.like = model, drafter, cache
        self.rng, self.context = Random(0), -1
        self.target = self._fresh([])
        limit = model.config.get_text_config(decoder=True).max_position_embeddings
        most, wanted = min(self.target.most + 1, limit // 4), SIZES + LARGE * (model.device.type == "cuda")
        self.sizes = [size for size in wanted if size <= most]
        self.drift = min(BUCKET, limit // 4)
        farthest = max(limit - self.sizes[-1] - self.drift, 1)
        self.contexts = sorted({min(context, farthest) for context in CONTEXTS})

    @torch.no_grad()
    def profile(self, report: Report) -> Profile:
        """Seconds of the target's pass over trees of some sizes behind some contexts."""
        return profile(self.verify, self.contexts, self.sizes, report)

    @torch.no_grad()
    def rounds(self, target: CostModel) -> CostModel:
        """The cost of whole rounds: the target's pass, and what drafting, building and committing take."""
        first, last = self.contexts[0], self.contexts[-1]
        near, far = self.rest(first), self.rest(last)
        slope = max(far - near, 0.0) / max(last - first, 1)
        return CostModel(target.curves, max(near - slope * first, 0.0), slope, self.node())

    def _fresh(self, taps: Sequence[Tensor]) -> Target:
        kv = self.like.method if isinstance(self.like, KVCache) else None
        cache = DynamicCache(config=self.model.config) if kv is None else kv.new_cache(self.model.config)
        return Target(self.model, cache, taps)

    def _tokens(self, count: int) -> list[int]:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        return [self.rng.randrange(vocabulary) for _ in range(count)]

    def verify(self, tokens: int, context: int) -> float:
        """Seconds of one pass over a tree behind `context` tokens, until the host has the target's tokens.

        The context is met up to what earlier passes left behind, a root each.
        """
        if context != self.context or self.target.seen > context + self.drift:
            self.target, self.context = self._fresh([]), context
            self.target.read(torch.tensor([self._tokens(context)], device=self.model.device))
        tree = binary(self._tokens(tokens))
        started = time.perf_counter()
        self.target.score(tree).argmax(-1).tolist()
        seconds = time.perf_counter() - started
        self.target.keep(tokens, [0])
        return seconds

    def rest(self, context: int) -> float:
        """Median seconds of drafting and committing behind `context` tokens."""
        self.drafter.reset()
        text, found, few = self._tokens(context), [], min(FEW, self.target.most + 1)
        with tapped(self.model, self.drafter.tap_layers) as taps:
            target = self._fresh(taps)
            target.read(torch.tensor([text], device=self.model.device))
            self._inject(target, 0)
            self.drafter.propose([*text, 0], WIDTH)
            for _ in range(max(min(ROUNDS, self.drift // few), 1)):
                target.score(chained(self._tokens(few))).argmax(-1).tolist()
                started = time.perf_counter()
                self._inject(target, target.seen - few)
                target.keep(few, range(few))
                text += self._tokens(few)
                self.drafter.propose([*text, 0], WIDTH).cut(1)
                found.append(time.perf_counter() - started)
        return float(np.median(found))

    def _inject(self, target: Target, first: int) -> None:
        if target.features is not None:
            self.drafter.inject(target.features, first)

    def node(self) -> float:
        """Seconds of the host for each node of a tree."""
        logp = torch.arange(1, WIDTH + 1).float().neg().expand(8, 1, -1).contiguous()
        links = torch.zeros(8, 1, WIDTH, dtype=torch.int64)
        proposal = Proposal("marginal", torch.arange(WIDTH).expand(8, 1, -1).contiguous(), logp, links)
        found = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            pops = BestFirst(proposal, 0)
            pops.tree(sum(1 for _ in islice(pops, MANY)))
            found.append(time.perf_counter() - started)
        return float(np.median(found)) / MANY
