"""Prompts of the user's data that share documents or sessions, as one model reads them; pages for them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from strop.core.method import Method
from strop.kv.reuse import Documents, Segments
from strop.model import Model
from strop.tasks.data import Row

PAGE = 16
"""Tokens of a page that is tried."""
PACKED = 4
"""Bits of a number in pages that are tried packed."""
TIMED = 32
"""Tokens that are written while the first one is timed, at most."""
CONTINUATION = 48
"""Tokens of a continuation whose answer is not known."""


@dataclass(frozen=True)
class Ask:
    """A prompt of which others may hold a part."""

    head: tuple[int, ...]
    """The token that begins every text of this model, where there is one; pages of documents do without."""
    documents: tuple[tuple[int, ...], ...]
    """None for a turn of a session."""
    query: tuple[int, ...]
    """What stands behind the documents, or the whole turn."""
    before: tuple[int, ...] | None
    """The turn before it in its session."""
    answer: str | None
    expected: tuple[int, ...]
    """The answer's tokens, when it is known."""
    tokens: int
    """New tokens that the answer may take."""

    @property
    def whole(self) -> tuple[int, ...]:
        """The prompt as it is read without reuse."""
        return (*self.head, *(token for document in self.documents for token in document), *self.query)


def asks(model: Model, rows: Sequence[Row], most: int, answer_tokens: int, room: int) -> tuple[Ask, ...]:
    """The first prompts that share something and fit into `room` tokens, in the file's order, `most` of them.

    An answer may take `answer_tokens`, or a little more than the known one.
    """
    sharing = (row for row in rows if row.documents or row.session is not None)
    return tuple(
        islice((ask for ask in _asks(model, sharing, answer_tokens) if len(ask.whole) <= room), most)
    )


def _asks(model: Model, rows: Iterable[Row], answer_tokens: int) -> Iterable[Ask]:
    turns: dict[str, tuple[int, ...]] = {}
    for row in rows:
        head, documents, query = (), (), tuple(model.encode(row.prompt))
        before = turns.get(row.session) if row.session is not None else None
        if row.session is not None:
            turns[row.session] = query
        else:
            head = query[: int(query[0] == model.tokenizer.bos_token_id)]
            documents = tuple(_bare(model, text) for text in row.documents)
            query = _bare(model, row.query)
        expected = _bare(model, row.answer) if row.answer else ()
        room = model.context_limit - len(head) - sum(map(len, documents)) - len(query)
        wanted = max(answer_tokens, len(expected) * 5 // 4 + 16) if row.answer else CONTINUATION
        tokens = min(wanted, max(room, 0))
        yield Ask(head, documents, query, before, row.answer, expected, tokens)


def reuse_methods(found: Sequence[Ask]) -> tuple[Method, ...]:
    """What `tune` tries: pages for all documents, repaired, packed; for all turns, for half of them, packed.

    There are never fewer than the longest prompt takes alone, read whole.
    """
    tried: list[Method] = []
    longest = [_pages(len(ask.whole) + max(ask.tokens, TIMED) + PAGE * len(ask.documents)) for ask in found]
    documents = {document for ask in found for document in ask.documents}
    if documents:
        own = max(len(ask.query) + max(ask.tokens, TIMED) for ask in found if ask.documents)
        pages = sum(_pages(len(document)) + 1 for document in documents) + _pages(own)
        pages = max(pages, *longest)
        tried += [Documents(page=PAGE, pages=pages), Documents(page=PAGE, pages=pages, repair=PAGE)]
        if _serves_packed(pages, max(len(ask.documents) for ask in found)):
            tried.append(Documents(page=PAGE, pages=pages, bits=PACKED))
    turns = [ask for ask in found if not ask.documents]
    if turns:
        pages = _blocks([turn.query for turn in turns]) + len(turns) * _pages(TIMED) + max(longest)
        half = max(pages // 2, *longest)
        tried += [Segments(page=PAGE, pages=count) for count in dict.fromkeys((pages, half))]
        if _serves_packed(pages, 0):
            tried.append(Segments(page=PAGE, pages=pages, bits=PACKED))
    return tuple(tried)


def _serves_packed(pages: int, documents: int) -> bool:
    """Whether a quarter of the pages suffices for those of a prompt that are never packed, and one more."""
    return 2 * documents + 2 < pages // 4


def _blocks(texts: Iterable[tuple[int, ...]]) -> int:
    """Full pages of texts, those that begin alike counted once."""
    found = set()
    for text in texts:
        parent = 0
        for start in range(0, len(text) - PAGE + 1, PAGE):
            parent = hash((parent, text[start : start + PAGE]))
            found.add(parent)
    return len(found)


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE)


def _bare(model: Model, text: str) -> tuple[int, ...]:
    return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])
