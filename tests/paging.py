"""What tests of pages share: models and their dense twins, documents in a store, victims of one's choice."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import chain

import torch
from conftest import DENSE, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, GlmConfig, PreTrainedModel

from strop.core.evict.base import Evictor
from strop.kv import KVarN
from strop.kv.paged import PagedModel, Segment, Share
from strop.kv.pages import Lease, PagedStore

CODEC = KVarN(bits=4, group=8).codec()
OTHERS = {
    "interleaved": CohereConfig(**DENSE | {"eos_token_id": 2}),
    "partial interleaved": GlmConfig(**DENSE | {"eos_token_id": 2}),
}


@cache
def other_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(OTHERS[name], attn_implementation="sdpa").eval()


def dense_model(name: str) -> PreTrainedModel:
    """The model as transformers runs it."""
    return other_model(name) if name in OTHERS else tiny_model(name, "sdpa")


def paged(name: str, pages: int = 64, page: int = 8, function=None, **options) -> PagedModel:
    """The model over a new store."""
    model = deepcopy(dense_model(name)) if name in OTHERS else tiny_model(name)
    return PagedModel(model, PagedStore(model, pages, page, **options), function)


def text(length: int, seed: int) -> list[int]:
    return torch.randint(1, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def valid(length: int, page: int) -> list[int]:
    """Slots that count of each of a text's pages."""
    return [min(page, length - start) for start in range(0, length, page)]


@dataclass(frozen=True)
class Document:
    """A document and where it lies."""

    tokens: list[int]
    blocks: list[int]
    lease: Lease

    def at(self, start: int) -> Segment:
        return Segment(self.lease.named, start, len(self.tokens), start)


def add_documents(lm: PagedModel, texts: Sequence[list[int]]) -> list[Document]:
    """Compute documents alone, all in one step, and seal them."""
    store, documents = lm.store, []
    for tokens in texts:
        blocks = store.blocks(tokens)
        documents.append(Document(tokens, blocks, store.acquire(blocks, 0, 0.0)))
    lm([Share(d.tokens, range(len(d.tokens)), [d.at(0)], ()) for d in documents])
    for document in documents:
        store.seal(document.blocks, 0, valid(len(document.tokens), store.page))
    return documents


def question(lm: PagedModel, documents: Sequence[Document], query: list[int]) -> Share:
    """A query behind documents in this order, in pages of its own; the logits of all its tokens."""
    segments, start = [], 0
    for document in documents:
        segments.append(document.at(start))
        start += len(document.tokens)
    own = lm.store.acquire([], -(-len(query) // lm.store.page), 0.0).anonymous
    segments.append(Segment(own, start, len(query)))
    return Share(query, range(start, start + len(query)), segments, range(len(query)))


def dense_answer(name: str, texts: Sequence[list[int]], query: list[int]) -> Tensor:
    """Logits of the query's tokens, the documents blind to each other by an explicit mask `[q, V]`."""
    pieces = [*texts, query]
    owner = torch.cat([torch.full((len(piece),), index) for index, piece in enumerate(pieces)])
    sees = (owner[:, None] == owner) | (owner[:, None] == len(texts))
    ids = torch.tensor([list(chain(*pieces))])
    mask = (sees & torch.ones_like(sees).tril())[None, None]
    with torch.no_grad():
        found = dense_model(name)(
            ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None], use_cache=False
        )
    return found.logits[0, -len(query) :]


class Chosen(Evictor):
    """Evicts the blocks that a test names, in this order, then any."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.idle: dict[int, None] = {}

    def on_ref_zero(self, block: int, index: int, now: float) -> None:
        self.idle[block] = None

    def on_hit(self, block: int, now: float) -> None:
        del self.idle[block]

    def victim(self, now: float) -> int:
        block = next((block for block in self.order if block in self.idle), next(iter(self.idle)))
        del self.idle[block]
        return block

    def __len__(self) -> int:
        return len(self.idle)
