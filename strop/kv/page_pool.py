"""Where pages lie: 16-bit rows, and with a codec also records, of all layers, with a sum of their bytes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from strop.core.cache import require
from strop.core.errors import StropError
from strop.kv.base import KVShape
from strop.kv.page_hash import Checksum
from strop.kv.tile_store import TileCodec


class PagePool:
    """Storage of `pages` pages; without a codec a page is its own row."""

    def __init__(
        self,
        shape: KVShape,
        dtype: torch.dtype,
        device: torch.device,
        pages: int,
        page: int,
        codec: TileCodec | None,
        open_pages: int,
    ) -> None:
        """With a codec only `open_pages` pages are in 16 bits at a time."""
        self.codec = codec
        size = (open_pages if codec else pages, shape.heads, page, shape.dim)
        self.keys = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]
        """Of each layer, `[rows, H_kv, page, D]`."""
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.records: list[Tensor] = []
        """Of each layer, `[pages, H_kv, bytes]` uint8; none without a codec."""
        self._sum = Checksum((shape.heads, page, shape.dim * dtype.itemsize // 8), device)
        if codec:
            codec.check_dim(shape.dim)
            packed = (pages, shape.heads, codec.record_bytes(shape.dim))
            self.records = [torch.zeros(packed, dtype=torch.uint8, device=device) for _ in self.keys]
            self._sum_packed = Checksum((shape.heads, 1, packed[2] // 8), device)
        self.row = np.full(pages, -1) if codec else np.arange(pages)
        """Where each page's 16 bits lie `[pages]`; -1: nowhere."""
        self.coded = np.zeros(pages, dtype=bool)
        """Which pages are to be read from `records`, where each lies under its own number `[pages]`."""
        self._free_rows = list(range(open_pages)) if codec else []

    @property
    def open_rows(self) -> int:
        """16-bit pages that may still be opened, with a codec."""
        return len(self._free_rows)

    def closed(self, pages: np.ndarray) -> int:
        """How many of the pages have no row."""
        return len(self._closed(pages))

    def open(self, pages: np.ndarray) -> None:
        """Have a row for each of the pages, which are to be written.

        Raises StropError when a codec's 16-bit pages run out; then nothing has changed.
        """
        new = self._closed(pages)
        if len(new) > len(self._free_rows):
            raise StropError(
                f"{len(new)} more pages are to be written and {len(self._free_rows)} of 16 bits are free: "
                "compute fewer tokens in one step, or give the store more open_pages"
            )
        for page in new:
            self.row[page] = self._free_rows.pop()

    def close(self, page: int) -> None:
        """Nothing of a page is needed any more."""
        self.coded[page] = False
        if self.codec and self.row[page] >= 0:
            self._free_rows.append(int(self.row[page]))
            self.row[page] = -1

    def pack(self, pages: Sequence[int]) -> None:
        """Move pages from their 16 bits into records."""
        if not pages or self.codec is None:
            return
        rows, to = self._index(self.row[pages]), self._index(pages)
        for keys, values, records in zip(self.keys, self.values, self.records, strict=True):
            records[to] = self.codec.encode(keys[rows], values[rows])
        for page in pages:
            self.close(page)
        self.coded[pages] = True

    def sums(self, pages: Sequence[int], valid: Sequence[int]) -> list[int]:
        """A number for the bytes of each page, of which so many slots count."""
        where, counts = np.array(pages, dtype=np.int64), np.array(valid, dtype=np.int64)
        coded, found = self.coded[where], np.empty(len(where), dtype=np.int64)
        if not coded.all():
            rows = self._index(self.row[where[~coded]])
            found[~coded] = self._sum(self.keys + self.values, rows, self._index(counts[~coded]))
        if coded.any():
            rows = self._index(where[coded])
            found[coded] = self._sum_packed(self.records, rows, torch.ones_like(rows))
        return found.tolist()

    def check(self) -> None:
        """Raise ValueError where a row is lost or used twice."""
        rows = self.row[self.row >= 0].tolist() + self._free_rows
        require(len(rows) == len(set(rows)) == len(self.keys[0]), "a row that is lost or used twice")
        require(not (self.codec and (self.coded & (self.row >= 0)).any()), "a record beside its 16 bits")

    def _closed(self, pages: np.ndarray) -> np.ndarray:
        return np.unique(pages[self.row[pages] < 0])

    def _index(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        return torch.as_tensor(np.array(numbers, dtype=np.int64), device=self.keys[0].device)
