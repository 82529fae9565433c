"""One step of a model over pages: rows of several requests in one pass, each at its true positions.

A request brings the tokens that it computes now, wherever holes in its context are, and its context as
segments of pages. Tokens of all requests are packed into one row `[1, N]` for the model's own forward; each
layer writes the keys and values of the packed rows into their pages and then attends by the step's plan.
Documents that were computed on their own, from position 0, stand behind a query with a shift.

Not covered: padding masks, several rows of a batch, taking tokens back: a page's slot can be written again
until it is sealed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from strop.core.attention import merge
from strop.core.cache import AttendingLayer, attach
from strop.core.errors import StropError
from strop.core.rope import Rope
from strop.kernels.paged import Attend, Plan, kernel
from strop.kv.page_codes import attend_codes
from strop.kv.pages import PagedStore


class Segment(NamedTuple):
    """Neighbouring tokens of a request's context."""

    pages: Sequence[int]
    """As many as `tokens` take; the last may be short."""
    start: int
    """True position of the first token in this request."""
    tokens: int
    shift: int = 0
    """`start` less the position for which the first key was rotated: 0 for a request's own tokens, its place
    for a document."""


@dataclass(frozen=True)
class Share:
    """What one request computes in a step."""

    tokens: Sequence[int]
    positions: Sequence[int]
    """True positions of the tokens, ascending; each in a segment of shift 0 that is not sealed there."""
    segments: Sequence[Segment]
    """The context, ascending. Below the last position all of it is written, or is by this step."""
    outputs: Sequence[int] = (-1,)
    """Which of the tokens' logits are wanted; none for a chunk that does not end its prompt."""


@dataclass(frozen=True)
class Step:
    """Rows of several requests, packed."""

    ids: Tensor
    """`[1, N]` int64."""
    positions: Tensor
    """`[1, N]` int64."""
    rows: Tensor
    """Where each row's key and value are written: a row of the pool `[N]` int64."""
    slots: Tensor
    """And which slot of it `[N]` int64."""
    outputs: Tensor
    """Rows whose logits are wanted `[K]` int64."""
    plan: Plan
    """Over pages of 16 bits."""
    coded: Plan | None
    """Over records, where any request reads one."""

    @classmethod
    def of(cls, shares: Sequence[Share], store: PagedStore, rope: Rope) -> "Step":
        """Pack requests' shares.

        Opens the pages to be written. Raises StropError for positions beyond the model's context, for
        segments whose pages do not fit, and when 16-bit pages run out; ValueError for a token without an
        open page.
        """
        device, pages = store.pool.keys[0].device, []
        requests, outputs, slots, first = [], [], [], 0
        for share in shares:
            positions = np.asarray(share.positions, dtype=np.int64)
            if not len(share.tokens) == len(positions) > 0 or (np.diff(positions) <= 0).any():
                raise ValueError("a share needs tokens, and as many positions that ascend")
            entries = _entries(share.segments, positions[-1], store)
            page, slot = _places(positions, entries)
            pages.append(page)
            slots.append(slot)
            requests.append((positions, entries))
            outputs += [first + range(len(positions))[index] for index in share.outputs]
            first += len(positions)
        rows = store.open(np.concatenate(pages))
        plain, coded = _apart(requests, store)
        return cls(
            ids=torch.tensor([[token for share in shares for token in share.tokens]], device=device),
            positions=torch.from_numpy(np.concatenate([at for at, _ in requests])).to(device)[None],
            rows=torch.from_numpy(rows).to(device),
            slots=torch.from_numpy(np.concatenate(slots)).to(device),
            outputs=torch.tensor(outputs, dtype=torch.int64, device=device),
            plan=Plan.of(plain, store.page, rope, device),
            coded=Plan.of(coded, store.page, rope, device) if coded else None,
        )


class PagedLayer(AttendingLayer):
    """One layer of a store for the length of a step: writes the packed rows, then attends."""

    is_croppable = False

    def __init__(
        self, config: PretrainedConfig, store: PagedStore, layer: int, step: Step, function: Attend
    ) -> None:
        super().__init__(config)
        self.pool, self.layer, self.step, self.function = store.pool, layer, step, function
        self.is_initialized = True

    @property
    def seen(self) -> int:
        """None: positions are given, and no mask is read."""
        return 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        for pool, new in ((self.pool.keys, keys), (self.pool.values, values)):
            pool[self.layer][self.step.rows, :, self.step.slots] = new[0].transpose(0, 1)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        step, pool, rows = self.step, self.pool, query[0].transpose(0, 1)
        keys, values = pool.keys[self.layer], pool.values[self.layer]
        parts = [self.function(rows, keys, values, step.plan, scaling, softcap)]
        if step.coded is not None and pool.codec is not None:
            records = pool.records[self.layer]
            parts.append(attend_codes(rows, records, step.coded, pool.codec, scaling, softcap))
        return merge(parts).out.to(query.dtype)[None]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the store has its tensors."""

    def settle(self) -> None:
        """Nothing: pages are packed when they are sealed."""

    def dense(self) -> tuple[Tensor, Tensor]:
        raise StropError("pages are read by strop's attention alone: call strop.kv.attach(model) first")

    def check(self) -> None:
        """Nothing of its own: see `PagedStore.check`."""

    def state(self) -> dict[str, Tensor]:
        raise StropError("pages belong to their store, not to one step's cache: save texts instead")

    def restore(self, state: dict[str, Tensor]) -> None:
        raise StropError("pages belong to their store, not to one step's cache: compute texts again")


class PagedCache(Cache):
    """A transformers cache for one step over a store."""

    def __init__(
        self, config: PretrainedConfig, store: PagedStore, step: Step, function: Attend | None = None
    ) -> None:
        """`function` is a realisation of paged attention; by default the one for the store's device."""
        device = store.pool.keys[0].device.type
        decoder, function = config.get_text_config(decoder=True), function or kernel(device)
        count = range(len(store.pool.keys))
        super().__init__(layers=[PagedLayer(decoder, store, layer, step, function) for layer in count])


class PagedModel:
    """A model that computes steps over a store of its own pages."""

    def __init__(self, model: PreTrainedModel, store: PagedStore, function: Attend | None = None) -> None:
        """Routes the model's attention through strop.

        Raises StropError for another model's store and for a model whose keys cannot be moved.
        """
        store.require_model(model)
        self.rope = Rope.of(model)
        self.model, self.store, self.function = attach(model), store, function

    @torch.no_grad()
    def __call__(self, shares: Sequence[Share]) -> Tensor:
        """Compute the shares' tokens in one pass: keys and values into their pages, and logits `[K, V]`.

        Of each share in order the wanted rows. What is written is served to others once it is sealed.
        """
        step = Step.of(shares, self.store, self.rope)
        cache = PagedCache(self.model.config, self.store, step, self.function)
        return self.model(
            step.ids,
            position_ids=step.positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=step.outputs,
        ).logits[0]


def _entries(segments: Sequence[Segment], last: int, store: PagedStore) -> np.ndarray:
    """A request's pages up to a position `[e, 4]`: page, start, valid slots, shift."""
    page, end, found = store.page, 0, [np.empty((0, 4), dtype=np.int64)]
    for segment in segments:
        begin = np.arange(0, segment.tokens, page)
        if len(segment.pages) != len(begin):
            raise StropError(
                f"{segment.tokens} tokens take {len(begin)} pages of {page}, not {len(segment.pages)}: cut "
                "the segment for this store's page size"
            )
        if segment.start < end:
            raise ValueError("the segments of a share must ascend and not overlap")
        end = segment.start + segment.tokens
        if end > store.context or abs(segment.shift) > store.context:
            raise StropError(
                f"a context of {end} tokens (moved by {segment.shift}) is beyond the {store.context} that "
                "this model was made for: give it fewer or shorter documents"
            )
        columns = (
            np.asarray(segment.pages),
            segment.start + begin,
            np.minimum(page, segment.tokens - begin),
            np.full(len(begin), segment.shift),
        )
        found.append(np.stack(columns, 1))
    entries = np.concatenate(found)
    return entries[entries[:, 1] <= last]


def _places(positions: np.ndarray, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The page and the slot `[n]` each where rows at `positions` are written."""
    at = np.searchsorted(entries[:, 1], positions, side="right") - 1
    where = entries[at]
    slot = positions - where[:, 1]
    if (at < 0).any() or (slot >= where[:, 2]).any() or where[:, 3].any():
        raise ValueError("a token to compute lies outside the request's own segments")
    return where[:, 0], slot


Requests = list[tuple[np.ndarray, np.ndarray]]
"""Positions `[n]` and entries `[e, 4]` of each request, as `Plan.of` wants them."""


def _apart(requests: Requests, store: PagedStore) -> tuple[Requests, Requests]:
    """Requests with their pages of 16 bits alone, and with their records alone; none where none is coded."""
    plain, packed = [], []
    for positions, entries in requests:
        coded = store.pool.coded[entries[:, 0]]
        packed.append((positions, entries[coded]))
        open_ = entries[~coded]
        open_[:, 0] = store.pool.row[open_[:, 0]]
        if (open_[:, 0] < 0).any():
            raise ValueError("a share reads a page that nobody wrote")
        plain.append((positions, open_))
    return plain, packed if any(len(entries) for _, entries in packed) else []
