"""What a step of the engine computes: a token of each request that writes, and chunks of prompts."""

from itertools import count, groupby

from strop.kv.paged import Segment, Share
from strop.kv.pages import PagedStore
from strop.kv.requests import Document, Held, Piece, Request


class Batch:
    """One step as it is put together."""

    def __init__(self, store: PagedStore, most: int) -> None:
        """Of prompts at most so many tokens are taken, but always a page."""
        self.store, self.most, self.left = store, most, most
        self.room = store.writable()
        """Pages that may still be opened."""
        self.shares: list[Share] = []
        self.rows: list[Request] = []
        """Whose next token each row of logits is."""
        self.pieces: list[Piece] = []
        """Blocks that the step writes, neighbours of a chain side by side."""
        self._written: set[int] = set()

    def decode(self, request: Request) -> None:
        """Take a request's newest token."""
        held, place = held_by(request), len(request.tokens) - 1
        position, segments = request.start + place, held.segments(request, self.store.page)
        self.room -= self.store.closed(held.pages[place // self.store.page])
        self.shares.append(Share(request.tokens[-1:], [position], segments))
        self.rows.append(request)

    def prefill(self, request: Request) -> list[Piece]:
        """Take what fits of a request's documents and prompt, in order; returns it."""
        todo, taken = held_by(request).todo, []
        while todo:
            piece = todo[0]
            if piece.block is not None and (piece.block in self._written or self.store.sealed(piece.block)):
                request.reused_tokens += 0 if request.output else len(piece.tokens)
            elif self._fits(piece):
                self.left -= len(piece.tokens)
                self.room -= 1
                taken.append(piece)
                if piece.block is not None:
                    self._written.add(piece.block)
                    self.pieces.append(piece)
            else:
                break
            todo.popleft()
        for document, pieces in groupby(taken, key=lambda piece: piece.document):
            self._share(request, document, list(pieces))
        return taken

    def _fits(self, piece: Piece) -> bool:
        """Whether a piece may join; alone in the step it is tried in any case, so that no step is empty."""
        first = self.left == self.most
        return (first or len(piece.tokens) <= self.left) and (self.room > 0 or (first and not self.shares))

    def seal(self) -> None:
        """All blocks of the step are written."""
        place = count()
        chains = groupby(self.pieces, key=lambda piece: (piece.document, piece.number - next(place)))
        for pieces in [list(chain) for _, chain in chains]:
            blocks = [piece.block for piece in pieces if piece.block is not None]
            self.store.seal(blocks, pieces[0].number, [len(piece.tokens) for piece in pieces])

    def _share(self, request: Request, document: Document | None, pieces: list[Piece]) -> None:
        held = held_by(request)
        tokens = [token for piece in pieces for token in piece.tokens]
        positions = [piece.position + slot for piece in pieces for slot in range(len(piece.tokens))]
        if document is not None:
            segments = [Segment(held.documents[document.blocks], 0, len(document.tokens))]
            self.shares.append(Share(tokens, positions, segments, outputs=()))
            return
        outputs = () if held.todo else (-1,)
        self.shares.append(Share(tokens, positions, held.segments(request, self.store.page), outputs))
        self.rows += [request] if outputs else []


def held_by(request: Request) -> Held:
    """What a request that runs holds."""
    assert request.held is not None, "a request that runs holds pages"
    return request.held
