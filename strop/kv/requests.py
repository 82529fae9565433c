"""A request as the engine sees it: documents before a prompt, the pages that it holds, what came of it.

A request's context is its documents, each computed alone and moved to its place, and then its own tokens at
their true positions. It is cut into pieces of at most a page; which of them must be computed is for the
store to say, so a request that loses its pages and comes again needs no other record.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import LogitsProcessor

from strop.kv.paged import Segment
from strop.kv.pages import Lease, PagedStore


@dataclass(frozen=True)
class Document:
    """A text that is computed by itself, from position 0."""

    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    """Names of its pages."""


class Place(NamedTuple):
    """Where a document stands in a request."""

    document: Document
    start: int
    repaired: int
    """Tokens at its beginning that the request computes again, in sight of the documents before."""


class Piece(NamedTuple):
    """Tokens of one page that a request needs."""

    document: Document | None
    """Whose they are; None for the request's own, repaired ones among them."""
    number: int
    """Of the page among those of its chain."""
    position: int
    """Of the first token: in the document, or in the request."""
    tokens: Sequence[int]
    block: int | None
    """The page's name; None for one that the request has for itself."""


@dataclass(frozen=True)
class Answer:
    """What a request wrote, and what that took."""

    token_ids: list[int]
    """What was written, the end of text included."""
    text: str | None
    """None without a tokenizer."""
    computed_tokens: int
    """Tokens of documents and prompt that were computed for it; after preemption, of what it wrote too."""
    computed_document_tokens: int
    """Of these the documents', repaired ones included."""
    recomputed_tokens: int
    """Of these the ones whose pages had been there before, and were lost."""
    reused_tokens: int
    """Tokens whose pages were there, or were computed for another request, when its first token came."""
    preemptions: int
    ttft_s: float
    """Seconds from its coming to its first token."""
    tpot_s: float | None
    """Seconds a token after the first; None where it wrote but one."""


@dataclass(eq=False)
class Request:
    """A prompt to continue; without a prompt the documents are computed and no more."""

    prompt: Sequence[int]
    max_new_tokens: int
    documents: Sequence[Document] = ()
    """In the order in which they stand before the prompt."""
    ends: frozenset[int] = frozenset()
    """Tokens that end the text."""
    sampler: LogitsProcessor | None = None
    """What makes scores of logits, of which the highest is taken; None leaves them as they are."""
    repair: int = 0
    """Tokens at the beginning of all documents but the first to compute again; whole pages."""
    tokens: list[int] = field(init=False)
    """The prompt and what is written so far."""
    held: "Held | None" = field(default=None, init=False)
    """What it holds while it runs."""
    arrived: float = field(default=0.0, init=False)
    first: float | None = field(default=None, init=False)
    """When the first token came."""
    ended: float | None = field(default=None, init=False)
    computed_tokens: int = field(default=0, init=False)
    computed_document_tokens: int = field(default=0, init=False)
    recomputed_tokens: int = field(default=0, init=False)
    reused_tokens: int = field(default=0, init=False)
    preemptions: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def output(self) -> list[int]:
        """What is written so far."""
        return self.tokens[len(self.prompt) :]

    @property
    def start(self) -> int:
        """Position of the first token of its own."""
        return sum(len(document.tokens) for document in self.documents)

    @property
    def over(self) -> bool:
        """Whether it has written all that it should."""
        count = len(self.tokens) - len(self.prompt)
        return count >= self.max_new_tokens or (count > 0 and self.tokens[-1] in self.ends)

    def places(self) -> list[Place]:
        """Where its documents stand."""
        found, start = [], 0
        for document in self.documents:
            repaired = min(self.repair, len(document.tokens)) if start and self.prompt else 0
            found.append(Place(document, start, repaired))
            start += len(document.tokens)
        return found

    def parent(self, store: PagedStore) -> int:
        """What stands before its own first block: no two ways to compute it share a name."""
        repair = [[self.repair]] if self.repair else []
        return store.seed([*(d.blocks for d in self.documents), *repair]) if self.documents else 0

    def blocks(self, store: PagedStore) -> list[int]:
        """Names of its own pages that are full, but for the last token, which is always computed."""
        full = max(len(self.tokens) - 1, 0) // store.page
        return store.blocks(self.tokens[: full * store.page], self.parent(store))

    def own_pages(self, tokens: int, page: int) -> int:
        """Pages of its own with so many tokens of its own, those of repaired documents included."""
        return pages_of(tokens, page) + sum(pages_of(place.repaired, page) for place in self.places())

    def open_pages(self, store: PagedStore) -> int:
        """Pages that it keeps open where a codec packs the others; 0 without one.

        The first page of each chain stays in 16 bits, and so do short ones. Those whose name another request
        was to write first come on top: they are not foreseen.
        """
        if store.pool.codec is None:
            return 0
        lengths = {document.blocks: len(document.tokens) for document in self.documents}
        documents = sum(1 + (length > store.page and length % store.page > 0) for length in lengths.values())
        repaired = sum(pages_of(place.repaired, store.page) for place in self.places())
        own = min(pages_of(len(self.prompt) + self.max_new_tokens, store.page), 2)
        return documents + repaired + own

    def chains(self, store: PagedStore) -> list[Sequence[int]]:
        """The chains of blocks that it holds: one for each document, its own last."""
        return [*{d.blocks: None for d in self.documents}, self.blocks(store)]

    def answer(self, text: str | None) -> Answer:
        """What came of it, once it has ended."""
        assert self.first is not None and self.ended is not None
        later = len(self.output) - 1
        return Answer(
            token_ids=self.output,
            text=text,
            computed_tokens=self.computed_tokens,
            computed_document_tokens=self.computed_document_tokens,
            recomputed_tokens=self.recomputed_tokens,
            reused_tokens=self.reused_tokens,
            preemptions=self.preemptions,
            ttft_s=self.first - self.arrived,
            tpot_s=(self.ended - self.first) / later if later else None,
        )


@dataclass(eq=False)
class Held:
    """What a request holds while it runs."""

    documents: dict[tuple[int, ...], list[int]]
    """Pages of each document by its blocks; of one that stands twice but once."""
    repaired: list[list[int]]
    """Pages of the repaired tokens of each document in order."""
    blocks: list[int]
    """Names of its own first pages."""
    pages: list[int]
    """Its own: first those with a name, then those without."""
    todo: deque[Piece]
    """What may have to be computed before it writes: documents first, then by position."""
    naming: bool = True
    """Whether its next full page may still get a name."""

    @classmethod
    def of(cls, request: Request, chains: Sequence[Sequence[int]], store: PagedStore, now: float) -> "Held":
        """Acquire all pages of a request, whose chains are given; there must be room.

        Chains with fewest pages missing come first, so that none gives way to another of the same request.
        """
        *documents, own = chains
        named = {}
        for chain in sorted(documents, key=lambda chain: sum(not store.sealed(block) for block in chain)):
            named[tuple(chain)] = _lease(store, chain, 0, now).named
        tail = pages_of(len(request.tokens), store.page) - len(own)
        lease = _lease(store, own, tail, now)
        counts = [pages_of(place.repaired, store.page) for place in request.places()]
        repaired = [_lease(store, [], count, now).anonymous for count in counts]
        held = cls(named, repaired, list(own), lease.named + lease.anonymous, deque())
        held.todo.extend(_pieces(request, held, store.page))
        return held

    def release(self, store: PagedStore, now: float) -> None:
        """Let go of everything; pages with a name stay cached."""
        for chain in self.documents:
            store.release(chain, [], now)
        anonymous = self.pages[len(self.blocks) :] + [page for pages in self.repaired for page in pages]
        store.release(self.blocks, anonymous, now)

    def segments(self, request: Request, page: int) -> list[Segment]:
        """The request's context: documents in order, then its own tokens."""
        found = []
        for (document, start, count), own in zip(request.places(), self.repaired, strict=True):
            pages, left = self.documents[document.blocks][len(own) :], len(document.tokens) - count
            if count:
                found.append(Segment(own, start, count))
            if left:
                found.append(Segment(pages, start + count, left, start))
        return [*found, Segment(self.pages, request.start, len(request.tokens))]

    def named(self) -> set[int]:
        """All blocks that it holds."""
        return {*self.blocks, *(block for chain in self.documents for block in chain)}

    def name_full_pages(self, request: Request, store: PagedStore, now: float) -> None:
        """Give names to its own pages that are full by now, so that others are served them."""
        while self.naming and (len(self.blocks) + 1) * store.page <= len(request.tokens):
            place = len(self.blocks)
            parent = self.blocks[-1] if self.blocks else request.parent(store)
            [block] = store.blocks(request.tokens[place * store.page : (place + 1) * store.page], parent)
            page = store.adopt(self.pages[place], block, now)
            if page is None:
                self.naming = False
            else:
                self.pages[place] = page
                self.blocks.append(block)
                store.seal([block], place, [store.page])


def pages_of(tokens: int, page: int) -> int:
    """Pages that so many tokens take."""
    return -(-tokens // page)


def _lease(store: PagedStore, blocks: Sequence[int], anonymous: int, now: float) -> Lease:
    lease = store.acquire(blocks, anonymous, now)
    assert lease is not None, "room was counted before"
    return lease


def _pieces(request: Request, held: Held, page: int) -> list[Piece]:
    pieces = []
    for document in {document.blocks: document for document in request.documents}.values():
        pieces += _cut(document, 0, document.tokens, document.blocks, page)
    for (document, start, count), pages in zip(request.places(), held.repaired, strict=True):
        pieces += _cut(None, start, document.tokens[:count], [None] * len(pages), page)
    unnamed = [None] * (len(held.pages) - len(held.blocks))
    return pieces + _cut(None, request.start, request.tokens, [*held.blocks, *unnamed], page)


def _cut(
    document: Document | None, start: int, tokens: Sequence[int], names: Sequence[int | None], page: int
) -> list[Piece]:
    return [
        Piece(document, index, start + index * page, tokens[index * page : (index + 1) * page], name)
        for index, name in enumerate(names)
    ]
