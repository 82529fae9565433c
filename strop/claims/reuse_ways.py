"""Ways to read documents: lazily, and what stands for other systems.

Those are the flat prompt with or without caching, documents whose keys are turned and written for each place,
over the old ones or beside them, and documents whose keys are taken as they are. All run on the same engine,
so that what differs is what they keep and compute.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strop.core.attention import Partial
from strop.core.rope import Rope, turned
from strop.kernels.paged import Plan, kernel
from strop.kv.documents import DocumentStore
from strop.kv.paged import PagedModel
from strop.kv.requests import Document, Request
from strop.kv.segments import SegmentCache
from strop.kv.texts import Text

PAGE = 16


class Lazy(DocumentStore):
    """LazyAttention."""

    def first(self, query: Text, documents: Sequence[Text]) -> Request:
        """A request that ran to its first token."""
        request = self.request(query, documents, 1)
        self.engine.finish([request])
        return request


class Unturned(Lazy):
    """Full reuse without position fix: documents' keys stay as if each stood first."""

    def __init__(self, *given: Any, **fields: Any) -> None:
        super().__init__(*given, **fields)
        self.engine.lm = PagedModel(self.texts.model, self.store, unturned)
        self.summing = 0.0
        """Seconds that sums of turned pages took: a guard of this store that no rival has."""

    def _seal(self, blocks: Sequence[int], valid: Sequence[int]) -> None:
        start = self.engine.clock()
        self.store.seal(blocks, 0, valid)
        self.summing += self.engine.clock() - start


def unturned(query: Tensor, keys: Tensor, values: Tensor, plan: Plan, *rest: Any) -> Partial:
    """`attend` that takes all keys as they lie."""
    spans = tuple(
        span._replace(sections=tuple(section._replace(turn=0) for section in span.sections))
        for span in plan.spans
    )
    still = replace(plan, spans=spans, turns=plan.turns * 0)
    return kernel(query.device.type)(query, keys, values, still, *rest)


class Turned(Unturned):
    """Block-Attention's re-rotation in place, as its port does where no other request reads the document.

    One copy of each document, wherever it was read last. What is missing is computed at place 0, in one pass,
    for which the rest is turned back.
    """

    def __init__(self, *given: Any, **fields: Any) -> None:
        super().__init__(*given, **fields)
        self.rope = Rope.of(self.texts.model)
        self.places: dict[tuple[int, ...], int] = {}
        """Where a document stands now."""

    def first(self, query: Text, documents: Sequence[Text]) -> Request:
        """A request that ran to its first token, the turning done before and that time added."""
        named, tokens = [self.document(text) for text in documents], self.texts.encode(query)
        ends = accumulate(len(document.tokens) for document in named)
        start = self.engine.clock() - self.summing
        with self._holding(named):
            lost = [one for one in named if not all(map(self.store.sealed, one.blocks))]
            self._turn(lost, [0] * len(lost))
        fills = [Request((), 0, [document]) for document in lost]
        self.engine.finish(fills)
        with self._holding(named):
            self._turn(named, [end - len(one.tokens) for one, end in zip(named, ends, strict=True)])
        spent = self.engine.clock() - self.summing - start
        request = Request(tokens, 1, named, ends=self.texts.ends)
        self.engine.finish([request])
        if request.computed_document_tokens:
            raise RuntimeError("control failed: a document was lost before it was read")
        request.arrived -= spent
        request.computed_tokens += sum(fill.computed_tokens for fill in fills)
        return request

    @contextmanager
    def _holding(self, documents: Sequence[Document]) -> Iterator[None]:
        """Documents that are held, and are the last to give way after that."""
        if any(self.store.acquire(one.blocks, 0, self.engine.clock()) is None for one in documents):
            raise RuntimeError("control failed: no room for the documents of a request")
        yield
        for document in documents:
            self.store.release(document.blocks, [], self.engine.clock())

    def _turn(self, documents: Sequence[Document], places: Sequence[int]) -> None:
        """Turn what is there of documents to their places, all in one go."""
        store, blocks, shifts, valid = self.store, list[int](), list[int](), list[int]()
        for document, place in zip(documents, places, strict=True):
            shift, count = place - self.places.get(document.tokens, 0), len(document.tokens)
            self.places[document.tokens] = place
            for number, block in enumerate(document.blocks):
                if shift and store.sealed(block):
                    blocks.append(block)
                    shifts.append(shift)
                    valid.append(min(store.page, count - number * store.page))
        if not blocks:
            return
        rows, device = (
            torch.from_numpy(np.concatenate([*map(store.unseal, blocks)])),
            store.pool.keys[0].device,
        )
        angles = [x[:, None, None] for x in self.rope.angles(torch.tensor(shifts, device=device))]
        for keys in store.pool.keys:
            keys[rows] = turned(keys[rows], *angles, self.rope.partner)
        self._seal(blocks, valid)


class Copied(Unturned):
    """Block-Attention's materialised re-rotation (arXiv 2409.15355): a copy of a document for each place.

    A document is computed at place 0; for another place its keys are turned and written to pages of their
    own, from whatever copy is there. Copies are cached beside each other, as where others read them.
    """

    def __init__(self, *given: Any, **fields: Any) -> None:
        super().__init__(*given, **fields)
        self.rope = Rope.of(self.texts.model)
        self.copies: dict[tuple[int, ...], dict[int, Document]] = {}
        """Names of a document's copies by place, cached or not."""

    def first(self, query: Text, documents: Sequence[Text]) -> Request:
        """A request that ran to its first token, its copies made before and that time added."""
        named, at, placed = [self.document(text) for text in documents], 0, []
        start, computed = self.engine.clock() - self.summing, 0
        for document in named:
            target = self._at(document, at)
            computed += self._hold(document, target, at)
            placed.append(target)
            at += len(document.tokens)
        for target in placed:
            self.store.release(target.blocks, [], self.engine.clock())
        spent = self.engine.clock() - self.summing - start
        request = Request(self.texts.encode(query), 1, placed, ends=self.texts.ends)
        self.engine.finish([request])
        if request.computed_document_tokens:
            raise RuntimeError("control failed: a copy was lost before it was read")
        request.arrived -= spent
        request.computed_tokens += computed
        return request

    def _at(self, document: Document, place: int) -> Document:
        copies = self.copies.setdefault(document.tokens, {0: document})
        if place not in copies:
            copies[place] = Document(document.tokens, tuple(self.store.blocks(document.tokens, place)))
        return copies[place]

    def _there(self, document: Document) -> bool:
        return all(self.store.sealed(block) for block in document.blocks)

    def _hold(self, document: Document, target: Document, place: int) -> int:
        """Hold a copy, made where it is not there; returns how many tokens were computed for it."""
        computed = 0
        if not self._there(target):
            copies = self.copies[document.tokens].items()
            source = next((at for at, copy in copies if self._there(copy)), 0)
            if not self._there(self._at(document, source)):
                fill = Request((), 0, [document])
                self.engine.finish([fill])
                computed = fill.computed_tokens
            if source != place:
                return computed + self._copy(self._at(document, source), target, place - source)
        self._acquire(target)
        return computed

    def _copy(self, source: Document, target: Document, shift: int) -> int:
        """Write what is missing of a copy, and hold it; nothing is computed."""
        store, pool, theirs = self.store, self.store.pool, self._acquire(source)
        ours = self._acquire(target)
        missing = [place for place, block in enumerate(target.blocks) if not store.sealed(block)]
        read = torch.from_numpy(pool.row[[theirs[place] for place in missing]])
        written = torch.from_numpy(store.open(np.array([ours[place] for place in missing])))
        for keys, values in zip(pool.keys, pool.values, strict=True):
            keys[written] = self.rope.rotate(keys[read], torch.tensor(shift, device=keys.device))
            values[written] = values[read]
        count = len(target.tokens)
        self._seal(target.blocks, [min(store.page, count - at) for at in range(0, count, store.page)])
        store.release(source.blocks, [], self.engine.clock())
        return 0

    def _acquire(self, document: Document) -> list[int]:
        lease = self.store.acquire(document.blocks, 0, self.engine.clock())
        if lease is None:
            raise RuntimeError("control failed: no room for a document and its copy")
        return lease.named


class Flat(SegmentCache):
    """Prefix caching: the prompt is one text, evicted by LRU."""

    def __init__(self, model: Any, tokenizer: Any, **fields: Any) -> None:
        super().__init__(model, tokenizer, evictor="lru", **fields)

    def first(self, query: Text, documents: Sequence[Text]) -> Request:
        """A request that ran to its first token."""
        request = self.request("".join([*documents, query]), 1)  # type: ignore[list-item]
        self.engine.finish([request])
        return request


class Forgetful(Flat):
    """Full recomputation: nothing is cached from one request to the next."""

    def first(self, query: Text, documents: Sequence[Text]) -> Request:
        """A request that ran to its first token."""
        empty(self)
        return super().first(query, documents)


def empty(cache: SegmentCache) -> None:
    """Evict everything."""
    store = cache.store
    lease = store.acquire([], store.pages, cache.engine.clock())
    if lease is None:
        raise RuntimeError("control failed: a store at rest has pages in use")
    store.release([], lease.anonymous, cache.engine.clock())


def cpu_seconds() -> float:
    """What the process has computed for; it waits for a GPU at every token."""
    return time.process_time()
