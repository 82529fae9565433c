"""Several requests over one store: each step computes decodes and chunks of prompts in one mixed batch.

A request is admitted when there are pages for all its blocks. Its prompt is computed in chunks of whole pages
that cross holes: what is cached, or is computed for another request in the same step, is skipped wherever it
stands (AsymCache, arXiv 2606.02964, 4 and 5.1). A page is sealed as soon as it is written, so what remains to
be done is always the store's to say. When pages run out the youngest request gives its own back, keeps what
it wrote, and waits at the head of the queue; its named pages stay cached. Where a codec packs pages, a
request is admitted with as many open ones as it keeps in 16 bits, and chunks take what is left.

Left out: priorities, swapping to the host, several prompts' chunks in fair shares: the oldest goes first.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from strop.core.chunks import BatchPolicy, Fixed
from strop.core.errors import StropError
from strop.kv.batch import Batch, held_by
from strop.kv.paged import PagedModel
from strop.kv.pages import PagedStore
from strop.kv.requests import Held, Request


class Engine:
    """Runs requests over a store's pages, of which it must be the only user."""

    def __init__(
        self,
        model: PreTrainedModel,
        store: PagedStore,
        chunks: BatchPolicy | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`chunks` says how many prompt tokens a step computes, 2048 by default; `clock` gives seconds.

        Raises StropError for another model's store and for a model whose keys cannot be moved.
        """
        self.lm = PagedModel(model, store)
        self.store, self.clock = store, clock
        self.chunks = Fixed() if chunks is None else chunks
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """By admission, the oldest first."""
        self._known: set[int] = set()
        """Blocks that were computed at any time; kept, as a number each."""

    def submit(self, request: Request) -> None:
        """Queue a request. Raises StropError for one that was here before or does not fit even alone."""
        if request.ended is not None or request in self.running or request in self.waiting:
            raise StropError("a request runs once: make another of the same prompt")
        self._require_servable(request)
        request.arrived = self.clock()
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Forget a request, where it has not ended."""
        if request in self.running:
            self._preempt(request)
        if request in self.waiting:
            self.waiting.remove(request)

    def run(self) -> None:
        """Step until all requests have ended."""
        while self.waiting or self.running:
            self.step()

    def finish(self, requests: Sequence[Request]) -> None:
        """Run requests, and what else waits, to their end; where that raises, these are forgotten."""
        try:
            for request in requests:
                self.submit(request)
            self.run()
        except BaseException:
            for request in requests:
                self.cancel(request)
            raise

    def step(self) -> None:
        """Compute one batch: a token of each request that writes, and a chunk of prompts.

        Where that raises, all requests wait again and nothing is lost but time.
        """
        now = self.clock()
        self._grow(now)
        self._admit(now)
        if not self.running and self.waiting:
            raise StropError(
                "the next request does not fit though none runs, since others hold pages of this store: "
                "release them, or give the engine a store of its own"
            )
        while self._opening() > self.store.writable():
            self._preempt(self.running[-1])
        try:
            batch = self._batch()
            self._settle(batch, self.lm(batch.shares) if batch.shares else torch.empty(0, 1))
        except BaseException:
            for request in reversed(tuple(self.running)):
                self._preempt(request)
            raise

    def _grow(self, now: float) -> None:
        """A page for each request whose next token needs one; the youngest give theirs back for it."""
        for request in tuple(self.running):
            held = request.held
            if held is None or held.todo or len(held.pages) * self.store.page >= len(request.tokens):
                continue
            while request.held and (lease := self.store.acquire([], 1, now)) is None:
                self._preempt(self.running[-1])
            if request.held:
                held.pages += lease.anonymous

    def _writing(self) -> list[Request]:
        return [request for request in self.running if not held_by(request).todo and request.tokens]

    def _opening(self) -> int:
        """Pages that the next tokens open, where a codec packs the others."""
        newest = (held_by(one).pages[(len(one.tokens) - 1) // self.store.page] for one in self._writing())
        return sum(map(self.store.closed, newest))

    def _admit(self, now: float) -> None:
        """Start waiting requests in order, while there are pages for all that the next one has so far."""
        while self.waiting:
            request = self.waiting[0]
            chains = request.chains(self.store)
            if not self._has_room(request, chains):
                return
            if self._damaged(chains):
                continue
            self.waiting.popleft()
            self.running.append(request)
            request.held = Held.of(request, chains, self.store, now)
            if not request.output:
                request.reused_tokens = 0

    def _has_room(self, request: Request, chains: Sequence[Sequence[int]]) -> bool:
        blocks = {block for chain in chains for block in chain}
        for other in self.running:
            blocks -= held_by(other).named()
        anonymous = request.own_pages(len(request.tokens), self.store.page) - len(chains[-1])
        open_pages = sum(one.open_pages(self.store) for one in (request, *self.running))
        return len(blocks) + anonymous <= self.store.residency.free and open_pages < self.store.open_pages

    def _damaged(self, chains: Sequence[Sequence[int]]) -> bool:
        """Check the bytes of a request's pages; whether requests that run were reading damaged ones.

        These wait again, and compute them again.
        """
        before = {block for chain in chains for block in chain if self.store.sealed(block)}
        for chain in chains:
            self.store.match(chain)
        lost = {block for block in before if not self.store.sealed(block)}
        readers = [other for other in self.running if lost & held_by(other).named()]
        for other in reversed(readers):
            self._preempt(other)
        return bool(readers)

    def _batch(self) -> Batch:
        """All decodes, and then prompts, the oldest first."""
        writing = self._writing()
        batch = Batch(self.store, self.chunks.chunk(len(writing)))
        for request in writing:
            batch.decode(request)
        for request in self.running:
            for piece in batch.prefill(request):
                tokens = len(piece.tokens)
                request.computed_tokens += tokens
                if piece.document is not None or piece.position < request.start:
                    request.computed_document_tokens += tokens
                request.recomputed_tokens += tokens if piece.block in self._known else 0
        return batch

    def _settle(self, batch: Batch, logits: Tensor) -> None:
        """Seal what was written, take the new tokens, end what is done."""
        batch.seal()
        self._known.update(piece.block for piece in batch.pieces if piece.block is not None)
        tokens = _next(batch.rows, logits)
        now = self.clock()
        for request, token in zip(batch.rows, tokens, strict=True):
            held_by(request).name_full_pages(request, self.store, now)
            self._known.update(held_by(request).blocks[-1:])
            request.tokens.append(token)
            request.first = now if request.first is None else request.first
        for request in tuple(self.running):
            held = held_by(request)
            if request.over and not held.todo:
                self.running.remove(request)
                held.release(self.store, now)
                request.held, request.ended = None, now

    def _preempt(self, request: Request) -> None:
        """A request gives its pages back and waits at the head, with what it wrote."""
        self.running.remove(request)
        held_by(request).release(self.store, self.clock())
        request.held = None
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _require_servable(self, request: Request) -> None:
        last = max(len(request.prompt) + request.max_new_tokens - 1, 0)
        if bool(request.prompt) != (request.max_new_tokens > 0):
            raise StropError("a prompt of no tokens cannot be continued, nor one by none: give 1 or more")
        if not request.prompt and not request.documents:
            raise StropError("a request of nothing has nothing to compute: give it a prompt or documents")
        if request.start + len(request.prompt) + request.max_new_tokens > self.store.context:
            raise StropError(
                f"{request.start} tokens of documents, {len(request.prompt)} of the prompt and "
                f"{request.max_new_tokens} new ones exceed the {self.store.context} that this model was made "
                "for: give it fewer or shorter documents"
            )
        blocks = {block for document in request.documents for block in document.blocks}
        need = len(blocks) + request.own_pages(last, self.store.page)
        if need > self.store.pages:
            raise StropError(
                f"this request needs {need} pages of {self.store.page} tokens and the store has "
                f"{self.store.pages}: make a store of more pages"
            )
        if (need := request.open_pages(self.store)) >= self.store.open_pages:
            raise StropError(
                f"this request keeps {need} pages in 16 bits, beside one that is computed, and the store has "
                f"{self.store.open_pages} of them: give it more open_pages, or a recipe more pages"
            )


def _next(requests: Sequence[Request], logits: Tensor) -> list[int]:
    """The next token of each request from its logits `[n, V]`."""
    tokens = logits.argmax(-1).tolist()
    for row, request in enumerate(requests):
        if request.sampler is not None:
            before = torch.empty((1, request.start + len(request.tokens)), dtype=torch.int64)
            tokens[row] = int(request.sampler(before, logits[row : row + 1].float()).argmax())
    return tokens
