"""Answers and first tokens over documents that are cached in several ways, and how often pools hold them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from strop.claims.base import Part, Progress, Row, part
from strop.claims.reuse_bed import BASE, BLOCK, CODER, DENSE, REPAIRED, Bed, Scale, drawn, questions
from strop.claims.reuse_hits import WAYS, foreseen, replayed, requests, static
from strop.claims.reuse_ways import PAGE, Copied, Flat, Forgetful, Lazy, Turned, Unturned, cpu_seconds
from strop.kv.paged import PagedModel, Share
from strop.kv.requests import Request
from strop.kv.texts import Texts

RECOMPUTE, CACHED, COPY, LAZY = "full recomputation", "prefix caching", "turned copies", "lazy"
IN_PLACE = "turned in place"
IN_SEQUENCE, NO_FIX, REPAIR = "in sequence", "no position fix", f"lazy, {REPAIRED} repaired"
SYSTEMS = {RECOMPUTE: Forgetful, CACHED: Flat, COPY: Copied, IN_PLACE: Turned, LAZY: Lazy}
ASKED = (BLOCK, DENSE, BASE)
"""Models that answer."""
ROOM = 1024
"""Pages where nothing should be evicted."""
Ways = dict[str, Callable[[Texts], Lazy | Flat]]
READ: Ways = {
    IN_SEQUENCE: lambda t: Flat(t.model, t.tokenizer, pages=ROOM, page=PAGE),
    LAZY: lambda t: Lazy(t.model, t.tokenizer, pages=ROOM, page=PAGE),
    NO_FIX: lambda t: Unturned(t.model, t.tokenizer, pages=ROOM, page=PAGE),
    REPAIR: lambda t: Lazy(t.model, t.tokenizer, pages=ROOM, page=PAGE, repair=REPAIRED),
}
"""How a model reads documents."""
ORDERED = (IN_SEQUENCE, LAZY)
"""Ways that are measured in every order."""


def asked(reader: Lazy | Flat, query: Sequence[int], documents: Sequence[Sequence[int]], new: int) -> Request:
    """A request of tokens, whatever the reader keeps."""
    if isinstance(reader, Flat):
        return reader.request([token for text in [*documents, query] for token in text], new)
    return reader.request(query, documents, new)


def answer_study(bed: Bed, progress: Progress, scale: Scale, name: str) -> list[Row]:
    """Share of right answers, by the way of reading and the order of documents."""
    texts, rows = bed.texts[name], []
    for way, make in READ.items():
        progress(f"{name}, {way}")
        for order in range(scale.orders if name == BLOCK and way in ORDERED else 1):
            right = []
            for seed in range(scale.seeds):
                reader, wanted, found = make(texts), [], []
                for one in questions(name, scale, seed, order):
                    wanted.append(texts.encode(one.answer))
                    documents = [texts.encode(text) for text in one.documents]
                    found.append(asked(reader, texts.encode(one.query), documents, len(wanted[-1])))
                reader.engine.finish(found)
                right.append(float(np.mean([r.output == w for r, w in zip(found, wanted, strict=True)])))
            rows.append({"model": name, "way": way, "order": order, "right": right})
    return rows


class Listening:
    """A paged model that keeps the logits of all rows of the newest share with any."""

    def __init__(self, lm: PagedModel) -> None:
        self.lm, self.heard = lm, torch.empty(0, 0)

    def __call__(self, shares: Sequence[Share]) -> Tensor:
        wide = [
            replace(share, outputs=range(len(share.tokens))) if share.outputs else share for share in shares
        ]
        logits = self.lm(wide)
        if len(logits):
            self.heard = logits
        return logits[-1:]


def loss(reader: Lazy | Flat, tokens: Sequence[int], cut: int) -> float:
    """Nats a token of a file's last piece, its first token aside, behind the others as documents."""
    documents = [tokens[at : at + cut] for at in range(0, len(tokens) - cut, cut)]
    reader.engine.lm = listening = Listening(reader.engine.lm)  # type: ignore[assignment]
    reader.engine.finish([asked(reader, tokens[-cut:], documents, 1)])
    reader.engine.lm = listening.lm
    logits = listening.heard[-cut:-1].double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1 - cut :]).to(logits.device)))


def text_study(bed: Bed, progress: Progress, scale: Scale) -> list[Row]:
    """What a language model loses on the last piece of a file, by how the pieces before were read."""
    rows = []
    for way, make in READ.items():
        progress(f"{CODER}, {way}")
        reader = make(bed.texts[CODER])
        losses = [loss(reader, tokens, scale.cut) for tokens in bed.files]
        rows.append({"way": way, "nats": np.reshape(losses, (scale.seeds, -1)).mean(1).tolist()})
    return rows


def first_study(bed: Bed, progress: Progress, scale: Scale, skew: float, pages: int) -> list[Row]:
    """CPU seconds to the first token, the systems taking turns by request.

    Raises RuntimeError where systems that compute the same give other tokens.
    """
    texts = bed.texts[BLOCK]
    found: dict[str, list[list[float]]] = {name: [] for name in SYSTEMS}
    computed: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    for seed in range(scale.seeds):
        progress(f"first tokens, skew {skew:g}, {pages} pages")
        systems = {
            name: make(texts.model, texts.tokenizer, pages=pages, page=PAGE, clock=cpu_seconds)
            for name, make in SYSTEMS.items()
        }
        ran: dict[str, list[Request]] = {name: [] for name in SYSTEMS}
        for documents, query in drawn(scale, skew, seed):
            for name, system in systems.items():
                ran[name].append(system.first(query, documents))
        require_same(ran, COPY, LAZY)
        require_same(ran, IN_PLACE, LAZY)
        require_same(ran, RECOMPUTE, CACHED)
        for name, done in ran.items():
            counted = done[scale.requests // 4 :]
            found[name].append([_ttft(one) for one in counted])
            whole = sum(one.start + len(one.prompt) for one in counted)
            computed[name].append(sum(one.computed_tokens for one in counted) / whole)
    return [
        {
            "skew": skew,
            "pages": pages,
            "system": name,
            "ttft_s": [float(np.mean(times)) for times in found[name]],
            "computed": computed[name],
        }
        for name in SYSTEMS
    ]


def require_same(ran: dict[str, list[Request]], one: str, other: str) -> None:
    """Control: two systems that should compute the same choose the same tokens, but for a tie."""
    same = np.mean([a.output == b.output for a, b in zip(ran[one], ran[other], strict=True)])
    if same < 0.9:
        raise RuntimeError(f"control failed: {one} and {other} agree on {same:.0%} of first tokens")


def _ttft(request: Request) -> float:
    assert request.first is not None, "a request that ran has a first token"
    return request.first - request.arrived


def hit_study(bed: object, progress: Progress, scale: Scale) -> list[Row]:
    """Hits of an LRU pool by its size."""
    rows = []
    for alpha in scale.alphas:
        progress(f"hits, Zipf {alpha:g}")
        draws = [
            requests(scale.known, alpha, scale.looked_up, scale.replayed, seed) for seed in range(scale.seeds)
        ]
        for size in scale.sizes:
            for way in WAYS:
                hits = [replayed(way, size, draw) for draw in draws]
                rows.append({"alpha": alpha, "documents": size, "names": way, "hits": hits})
    return rows


def static_study(bed: object, progress: Progress, scale: Scale) -> list[Row]:
    """Hits of a cache that holds the likeliest documents, and what the equation says."""
    progress("a static cache")
    rows = []
    for alpha in scale.alphas:
        for places in (1, scale.looked_up):
            for size in scale.sizes:
                told = foreseen(scale.known, alpha, size, places)
                hits = [
                    static(scale.known, alpha, size, places, scale.draws, seed) for seed in range(scale.seeds)
                ]
                head = {"alpha": alpha, "places": places, "documents": size}
                rows.append(head | {"hits": hits, "foreseen": told})
    return rows


def parts(scale: Scale) -> list[Part]:
    """The experiments."""
    read = [part("answers", name, len(READ), partial(answer_study, scale=scale, name=name)) for name in ASKED]
    first = [
        part(
            "first",
            f"skew {skew:g}, {pages} pages",
            scale.seeds,
            partial(first_study, scale=scale, skew=skew, pages=pages),
            timed=True,
        )
        for skew in scale.skews
        for pages in scale.pools
    ]
    return [
        *read,
        part("text", "", len(READ), partial(text_study, scale=scale)),
        part("hits", "", len(scale.alphas), partial(hit_study, scale=scale)),
        part("static", "", 1, partial(static_study, scale=scale)),
        *first,
    ]
