"""Documents whose keys and values are computed once and stand anywhere in any later prompt.

Each document is read by itself from position 0, and where it stands later its keys are turned to that place
(LazyAttention, arXiv 2606.04302); the query sees all of them. Answers are the model's own wherever it was
trained to read documents that do not see each other (Block-Attention, arXiv 2409.15355; see
`document_training`). For other models `repair` computes the first tokens of each document again, in sight of
those before it, as an approximation (CacheBlend, arXiv 2405.16444, chooses them by deviation instead).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from strop.core.chunks import BatchPolicy
from strop.core.errors import StropError
from strop.core.sampling import KeyedSampler
from strop.kv.engine import Engine
from strop.kv.pages import PagedStore
from strop.kv.requests import Answer, Document, Request
from strop.kv.texts import Text, Texts
from strop.kv.tile_store import TileCodec


class DocumentStore:
    """Documents in pages of one model, and queries on them; what had to give way is computed again."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        pages: int | None = None,
        page: int = 16,
        repair: int = 0,
        codec: TileCodec | None = None,
        open_pages: int | None = None,
        chunks: BatchPolicy | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """At most `pages` of `page` tokens, for a `strop.Model` or a transformers model and its tokenizer.

        None holds four contexts of the model, 32,768 tokens at most.
        `repair` tokens, whole pages, are computed again at the beginning of every document but the first.
        A `codec` packs pages, of which `open_pages` stay in 16 bits: see `PagedStore`.
        Raises StropError for a model whose keys cannot be moved, and for sizes that do not fit.
        """
        self.texts = Texts.of(model, tokenizer)
        pages = self.texts.pages(pages, page)
        self.store = PagedStore(self.texts.model, pages, page, codec=codec, open_pages=open_pages)
        if repair < 0 or repair % page:
            raise StropError(
                f"a repair of {repair} tokens cuts a page: give a multiple of the page's {page} tokens"
            )
        self.repair = repair
        self.engine = Engine(self.texts.model, self.store, chunks, clock)

    def add(self, documents: Sequence[Text]) -> list[Document]:
        """Compute the documents that are not there yet; returns what `generate` may be given for each.

        Raises StropError for a document beyond the model's context or larger than the store.
        """
        found = [self.document(text) for text in _several(documents)]
        self.engine.finish([Request((), 0, [document]) for document in found])
        return found

    def document(self, text: Text) -> Document:
        """A document by its text or token ids; computes nothing."""
        tokens = self.texts.encode(text)
        return Document(tuple(tokens), tuple(self.store.blocks(tokens)))

    def request(
        self,
        query: Text,
        documents: Sequence[Document | Text] = (),
        max_new_tokens: int = 64,
        seed: int | None = None,
        temperature: float = 1.0,
    ) -> Request:
        """What `generate` does as a request for `engine`, to be run beside others."""
        return Request(
            self.texts.encode(query),
            max_new_tokens,
            [self._known(document) for document in _several(documents)],
            ends=self.texts.ends,
            sampler=None if seed is None else KeyedSampler(seed, [0], [0], temperature),
            repair=self.repair,
        )

    def generate(
        self,
        query: Text,
        documents: Sequence[Document | Text] = (),
        max_new_tokens: int = 64,
        seed: int | None = None,
        temperature: float = 1.0,
    ) -> Answer:
        """Continue a query behind documents in the order given, computing those that are not there.

        Greedy without a seed; with one, tokens are drawn at `temperature` with noise keyed by (seed,
        position). Raises StropError for an empty query, a document of another store, and for more tokens
        than the model's context or the store holds.
        """
        request = self.request(query, documents, max_new_tokens, seed, temperature)
        self.engine.finish([request])
        return request.answer(self.texts.decode(request.output))

    def _known(self, document: Document | Text) -> Document:
        if not isinstance(document, Document):
            return self.document(document)
        if tuple(self.store.blocks(document.tokens)) != document.blocks:
            raise StropError(
                "a document was added to the store of another model or page size: add it to this one"
            )
        return document


def _several(documents: Sequence[Any]) -> Sequence[Any]:
    """The documents. Raises StropError for what is no list: letters would be taken for documents."""
    if not isinstance(documents, Sequence) or isinstance(documents, str | Document):
        raise StropError("documents come in a list: put the one that there is into a list too")
    return documents
