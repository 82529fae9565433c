"""A reuse method beside the model as is, on the data's own prompts in the file's order.

Documents that are read alone change what the model sees, so quality is measured as for any other method: on
the answers that the data gives, the baseline's own where it gives none, and on what is written greedily. The
first token is timed as the file comes, with nothing there (cold), and with all there but the query or turn
(warm), beside reading everything and beside prefix caching with pages as many, each in turns with the others.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from strop.audit import speed as timing
from strop.audit.memory import peak_bytes, reset_peak
from strop.audit.quality import TokenLosses, agreement, exact_match_loss, summary
from strop.core.errors import StropError
from strop.core.intervals import bootstrap
from strop.kv.documents import DocumentStore
from strop.kv.requests import Request
from strop.kv.reuse import Documents, Segments
from strop.kv.segments import SegmentCache
from strop.model import Model
from strop.tune.greedy import in_batches
from strop.tune.shared import Ask
from strop.tune.workload import CONTINUATION, Workload, answered

CONTINUED = 16
"""Prompts without an answer whose greedy continuation is compared."""
SCORED = 1_024
"""Tokens of answers that perplexity and KL are taken on, at most."""
MOST_ROUNDS = 40
"""Prompts that are timed, at most."""

Pages = DocumentStore | SegmentCache
Report = Callable[[str, float], None]


class Forced(LogitsProcessor):
    """Has a text written that is given, and compares the logits on the way with the baseline's."""

    def __init__(self, text: Sequence[int], base: Tensor) -> None:
        """Of each of the text's tokens `base` `[n, V]` are the baseline's log-probabilities."""
        self.text, self.base = text, base
        self.rows: list[tuple[float, float, float]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        p, q = self.base[len(self.rows)], scores[0].float().log_softmax(-1)
        token = self.text[len(self.rows)]
        kl = float((p.exp() * (p - q)).sum().clamp(min=0))
        self.rows.append((-float(p[token]), -float(q[token]), kl))
        return torch.nn.functional.one_hot(torch.tensor([token], device=q.device), len(q)).float()

    def losses(self) -> TokenLosses:
        """What was seen, a row a token."""
        return TokenLosses(*np.array(self.rows).T)


class ReuseBench:
    """A baseline on prompts that share something; what it writes is computed once for all methods."""

    def __init__(self, base: Model, work: Workload, seed: int) -> None:
        self.base, self.work, self.seed = base, work, seed

    @cached_property
    def written(self) -> dict[Ask, list[int]]:
        """The baseline's greedy continuations."""
        asks = [ask for ask in self.work.asks if ask.tokens]
        rows = in_batches(self.base, [ask.whole for ask in asks], [ask.tokens for ask in asks])
        return dict(zip(asks, rows, strict=True))

    def measure(self, model: Model, report: Report) -> dict[str, Any]:
        """Memory, quality, speed and what was reused. Raises StropError where the data shares nothing."""
        method = model.recipe.reuse
        assert method is not None, "the slot is filled"
        alone = isinstance(method, Documents)
        asks = [ask for ask in self.work.asks if bool(ask.documents) == alone and ask.tokens]
        if len(asks) < 2:
            wanted = '"documents": [...]' if alone else '"session": "NAME"'
            raise StropError(
                f"{len(asks)} prompts of the data share what this method keeps, and it takes 2 to bound "
                f"anything: give rows `{wanted}` beside the prompt"
            )
        pages = method.open(model)
        reset_peak(self.base.device)
        report("quality", 0.0)
        quality = self.quality(pages, asks, method.lossless, report)
        memory = self.memory(model, pages)
        del pages  # the ones that are timed have read nothing before
        return {"memory": memory, "quality": quality, **self.speed(model, asks, report)}

    def memory(self, model: Model, pages: Pages) -> dict[str, Any]:
        """Weights and all pages, over the baseline's weights and one batch of its caches."""
        tokens, batch = self.work.context, len(self.work.speed_batches[0])
        weights, held = model.weight_bytes(), pages.store.bytes()
        dense = self.base.weight_bytes() + batch * model.kv_shape.dense_bytes(tokens)
        return {
            "weights_bytes": weights, "kv_bytes": held, "kv_bytes_measured": held, "drafter_bytes": 0,
            "total_bytes": weights + held, "ratio": (weights + held) / dense,
            "peak_rss_bytes": peak_bytes(self.base.device), "context": tokens, "batch": batch,
        }  # fmt: skip

    def quality(self, pages: Pages, asks: Sequence[Ask], lossless: bool, report: Report) -> dict[str, Any]:
        """Perplexity and KL of answers, exact match, agreement."""
        rows, tokens = [], 0
        for ask in asks:
            if tokens >= SCORED:
                break
            losses = self._losses(pages, ask)
            rows.append(losses.sums())
            tokens += len(losses.kl)
            report("quality", 0.4 * tokens / SCORED)
        found = dataclasses.asdict(summary(rows, self.seed)) | {
            "exact_match": None, "exact_match_loss": None, "exact_match_loss_hi": None, "recall": None,
        }  # fmt: skip
        shown = [ask for i, ask in enumerate(asks) if ask.answer is not None or i < CONTINUED]
        requests = [request_for(pages, ask, ask.tokens) for ask in shown]
        pages.engine.finish(requests)
        ours = [request.output for request in requests]
        theirs = [_ended(self.written[ask], pages.texts.ends) for ask in shown]
        first = [ids[:CONTINUATION] for ids in theirs]
        found["agreement"] = agreement(first, [ids[:CONTINUATION] for ids in ours])
        report("quality", 0.6)
        asked = [number for number, ask in enumerate(shown) if ask.answer is not None]
        if asked:
            before, right = (self._right(shown, ids, asked) for ids in (theirs, ours))
            found["exact_match"] = sum(right) / len(right)
            if limits := exact_match_loss(before, right, self.seed):
                sure = lossless and right == before
                found |= {"exact_match_loss": limits[0], "exact_match_loss_hi": 0.0 if sure else limits[2]}
        drops = (found["ppl_rise_hi"], found["exact_match_loss_hi"])
        return found | {"drop_hi": max(drop for drop in drops if drop is not None)}

    def speed(self, model: Model, asks: Sequence[Ask], report: Report) -> dict[str, Any]:
        """Seconds to the first token in five ways, in turns; the time of a token behind it in two."""
        method = model.recipe.reuse
        assert method is not None, "the slot is filled"
        prefix = Segments(page=method.page, pages=method.pages, evictor="lru").open(model)
        pages, spare = method.open(model), method.open(model)
        ways = {
            "full": lambda ask: timing.generation_times(self.base, [ask.whole], timing.STEPS),
            "prefix": lambda ask: _timed(prefix, dataclasses.replace(ask, documents=(), query=ask.whole)),
            "reuse": lambda ask: _timed(pages, ask),
            "cold": lambda ask: (empty(spare), _timed(spare, ask, 0))[1],
            "warm": lambda ask: (empty(spare), warm(spare, ask), _timed(spare, ask, 0))[2],
        }  # fmt: skip
        for name in ("full", "cold"):
            ways[name](asks[0])
        rounds: list[dict[str, tuple[float, ...]]] = []
        deadline = time.monotonic() + 2 * timing.SECONDS
        for number, ask in enumerate(asks[:MOST_ROUNDS]):
            if number >= timing.LEAST_ROUNDS and time.monotonic() >= deadline:
                break
            order = list(ways) if number % 2 == 0 else list(reversed(ways))
            taken = {name: ways[name](ask) for name in order if name != "warm" or ask.documents or ask.before}
            rounds.append(taken)
            report("speed", 0.6 + 0.4 * number / len(asks))
        return self._told(rounds, [len(ask.whole) for ask in asks[: len(rounds)]])

    def _told(self, rounds: Sequence[dict[str, tuple[float, ...]]], tokens: Sequence[int]) -> dict[str, Any]:
        """Times, ratios with intervals, and how many tokens were computed of those of the prompts."""

        def ratio(name: str, other: str = "full", part: int = 0) -> tuple[float, float, float] | None:
            both = [(taken[other][part], taken[name][part]) for taken in rounds if name in taken]
            return bootstrap(np.array(both), _median_of_ratios, self.seed) if len(both) > 1 else None

        def seconds(name: str, part: int = 0) -> float | None:
            found = [taken[name][part] for taken in rounds if name in taken]
            return float(np.median(found)) if found else None

        computed = {name: sum(int(taken[name][2]) for taken in rounds) for name in ("reuse", "prefix")}
        reuse: dict[str, Any] = {
            "prompts": len(rounds),
            "prompt_tokens": sum(tokens),
            "computed_tokens": computed["reuse"],
            "computed_share": computed["reuse"] / sum(tokens),
            "prefix_computed_tokens": computed["prefix"],
            "recomputed_tokens": sum(int(taken["reuse"][3]) for taken in rounds),
            "full_s": seconds("full"),
            "beside_prefix_ratio": ratio("reuse", "prefix"),
            "beside_prefix_s": seconds("prefix"),
        }
        for name in ("cold", "warm"):
            reuse |= {f"{name}_s": seconds(name), f"{name}_ratio": ratio(name)}
        speed = {
            "ttft_s": seconds("reuse"), "step_s": seconds("reuse", 1), "kv_s": None, "kv_ratio": None,
            "ttft_ratio": ratio("reuse"), "step_ratio": ratio("reuse", part=1),
        }  # fmt: skip
        return {"speed": speed, "reuse": reuse}

    @torch.no_grad()
    def _losses(self, pages: Pages, ask: Ask) -> TokenLosses:
        """Both models on the answer, or on what the baseline itself writes where none is known."""
        ends = pages.texts.ends
        text = list(ask.expected or _ended(self.written[ask], ends))[: min(CONTINUATION, ask.tokens)]
        ids = torch.tensor([[*ask.whole, *text]], device=self.base.device)
        logits = self.base.model(ids, logits_to_keep=len(text) + 1).logits[0, :-1]
        request = request_for(pages, ask, len(text), short=False)
        request.sampler = compared = Forced(text, logits.float().log_softmax(-1))
        pages.engine.finish([request])
        return compared.losses()

    def _right(self, asks: Sequence[Ask], ids: Sequence[list[int]], which: Sequence[int]) -> list[bool]:
        texts = self.base.tokenizer.batch_decode([ids[number] for number in which], skip_special_tokens=True)
        answers = [asks[number].answer or "" for number in which]
        pairs = zip(answers, texts, strict=True)
        return [answered(self.work.extract, answer, text) for answer, text in pairs]


def request_for(pages: Pages, ask: Ask, tokens: int, short: bool = True) -> Request:
    """A prompt for its pages; unless `short`, the end of text does not end what is written."""
    if isinstance(pages, DocumentStore):
        request = pages.request(ask.query, ask.documents, tokens)
    else:
        request = pages.request(ask.query, tokens)
    request.ends = request.ends if short else frozenset()
    return request


def empty(pages: Pages) -> None:
    """Have everything evicted that no request holds."""
    store, now = pages.store, pages.engine.clock()
    lease = store.acquire([], store.pages, now)
    assert lease is not None, "nothing runs between measurements"
    store.release([], lease.anonymous, now)


def warm(pages: Pages, ask: Ask) -> None:
    """Have read what comes before a query, or a turn."""
    if isinstance(pages, DocumentStore):
        pages.add(ask.documents)
    elif ask.before:
        pages.generate(ask.before, 1)


def _timed(pages: Pages, ask: Ask, steps: int | None = None) -> tuple[float, float, int, int]:
    """Seconds to the first token and per token after it; tokens computed, and of these again."""
    later, clock = timing.STEPS if steps is None else steps, pages.engine.clock
    start = clock()
    request = request_for(pages, ask, 1 + later, short=False)
    pages.engine.finish([request])
    assert request.first is not None and request.ended is not None, "it has ended"
    step = (request.ended - request.first) / later if later else 0.0
    return request.first - start, step, request.computed_tokens, request.recomputed_tokens


def _ended(ids: Sequence[int], ends: frozenset[int]) -> list[int]:
    """What was written up to the end of text, which is part of it."""
    stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:stop])


def _median_of_ratios(sample: np.ndarray) -> np.ndarray:
    return np.median(sample[:, :, 1] / sample[:, :, 0], axis=1)
