"""The contract of the `reuse` slot: pages in which prompts that share a part have its keys and values once.

A prompt alone does not say what it shares, so a method is no cache: it opens the pages that prompts are given
to, `DocumentStore` or `SegmentCache`, which replace the recipe's cache.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from strop.core.bits import BYTE_WIDTHS
from strop.core.errors import StropError
from strop.core.evict import ONLINE
from strop.core.method import Method
from strop.kv.documents import DocumentStore
from strop.kv.kvarn import KVarN
from strop.kv.pages import PAGES
from strop.kv.segments import SegmentCache
from strop.kv.tile_store import TileCodec


@dataclass(frozen=True, kw_only=True)
class ReuseMethod(Method, ABC):
    """One way to share keys and values among prompts."""

    kind: ClassVar[str]
    """The class that it opens, for people."""
    page: int = 16
    """Tokens of a page."""
    pages: int = 256
    bits: int = 16
    """Of a number in a full page behind the first of its text; fewer are KVarN's (arXiv 2606.03458)."""

    def __post_init__(self) -> None:
        if self.bits not in (*BYTE_WIDTHS, 16):
            raise ValueError(f"bits must be one of {', '.join(map(str, BYTE_WIDTHS))} or 16, got {self.bits}")
        if self.page not in PAGES:
            raise ValueError(f"page must be one of {', '.join(map(str, PAGES))}, got {self.page}")
        if self.pages < 1:
            raise ValueError(f"pages must be 1 or more, got {self.pages}")

    def needs_pages(self) -> StropError:
        """Why a prompt alone is not read under this method, and how it is used."""
        return StropError(
            f"prompts that share a part go to pages, a {self.kind}: use "
            "lm.recipe.reuse.open(lm).generate(...), or leave the reuse slot empty"
        )

    def settings(self) -> str:
        """The number of pages, then every other changed field."""
        return self.spell(f"{self.pages} pages", "pages")

    def codec(self) -> TileCodec | None:
        """What packs a page; None where nothing does."""
        return None if self.bits == 16 else KVarN(bits=self.bits, group=self.page, tail=self.page).codec()

    @abstractmethod
    def open(self, model: Any) -> DocumentStore | SegmentCache:
        """Empty pages for a `strop.Model`.

        Raises StropError for a model whose keys cannot be moved.
        """


@dataclass(frozen=True, kw_only=True)
class Documents(ReuseMethod):
    """Documents are read alone, once, and stand anywhere (arXiv 2606.04302)."""

    kind: ClassVar[str] = "strop.kv.DocumentStore"
    repair: int = 0
    """Tokens at the beginning of all documents but the first that are computed again; whole pages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repair < 0 or self.repair % self.page:
            raise ValueError(f"repair must be a multiple of page, got {self.repair}")

    def open(self, model: Any) -> DocumentStore:
        return DocumentStore(model, pages=self.pages, page=self.page, repair=self.repair, codec=self.codec())


@dataclass(frozen=True, kw_only=True)
class Segments(ReuseMethod):
    """Sessions use what is left of their blocks, wherever holes are (arXiv 2606.02964)."""

    kind: ClassVar[str] = "strop.kv.SegmentCache"
    evictor: str = "asymcache"
    """Which block goes first, by its name in `strop.core.evict.ONLINE`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evictor not in ONLINE:
            raise ValueError(f"evictor must be one of {', '.join(ONLINE)}, got {self.evictor}")

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        return self.bits == 16

    def open(self, model: Any) -> SegmentCache:
        return SegmentCache(model, pages=self.pages, page=self.page, evictor=self.evictor, codec=self.codec())
