"""One sequence that a request asks for, from the queue to its last token."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from strop.server.draw import Draw
from strop.server.text import TextStream

Finish = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Piece:
    """What came of a row: new text, tokens so far, and why it ended, once it has."""

    text: str
    tokens: int
    finish: Finish | None = None
    """None, "stop" or "length"; "error" where the model failed, and `text` says how."""


@dataclass(eq=False)
class Row:
    """A sequence to write. Made by the event loop; its text and clock belong to the engine's thread."""

    prompt: list[int]
    most: int
    """Most tokens to write."""
    draw: Draw | None
    """None takes the likeliest token."""
    text: TextStream
    ends: frozenset[int]
    """Tokens that end the text."""
    tell: Callable[[Piece], None]
    """Hears each piece; called in the engine's thread."""
    note: Callable[["Row", int], None] = lambda row, count: None
    """Measures so many new tokens of one step; the engine's."""
    ended: Callable[[str], None] = lambda reason: None
    """Counts why the row ended, once; the engine's."""
    finish: Finish | Literal["abort"] | None = None
    """Why it ended; "abort" where nobody waits for it any more."""
    tokens: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    latest: float = 0.0
    """When the newest token came."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held where the row may end: the engine's thread finishes what the event loop gives up."""

    @property
    def over(self) -> bool:
        """Whether nothing more is to be written."""
        return self.finish is not None

    @property
    def position(self) -> int:
        """Where the next token goes."""
        return len(self.prompt) + self.tokens

    def take(self, tokens: Sequence[int]) -> None:
        """Write the tokens of a step, up to one that ends the row; nothing where it is over."""
        if self.over:
            return
        text, finish, count = "", None, 0
        while finish is None and count < len(tokens):
            token, count = tokens[count], count + 1
            text += self.text.add(token)
            finish = self._finish(token, count)
        if finish is not None and not self.text.stopped:
            text += self.text.end()
            finish = "stop" if self.text.stopped else finish
        if not self._add(count, finish):
            return
        self.note(self, count)
        if text or finish is not None:
            self._tell(Piece(text, self.tokens, finish))

    def cancel(self) -> None:
        """Give the row up."""
        self._add(0, "abort")

    def fail(self, sentence: str, reason: Literal["error", "abort"] = "error") -> None:
        """Say that no more will come, and why."""
        if self._add(0, reason):
            self._tell(Piece(sentence, self.tokens, "error"))

    def _finish(self, token: int, count: int) -> Finish | None:
        """Why the newest of `count` tokens ends the row, if it does."""
        if self.text.stopped or token in self.ends:
            return "stop"
        return "length" if self.tokens + count >= self.most else None

    def _add(self, count: int, finish: Finish | Literal["abort"] | None) -> bool:
        """Add tokens, or the end, or both, unless the row is over; whether it was not."""
        with self.lock:
            if self.over:
                return False
            self.tokens += count
            self.finish = finish
        if finish is not None:
            self.ended(finish)
        return True

    def _tell(self, piece: Piece) -> None:
        try:
            self.tell(piece)
        except RuntimeError:  # the event loop that listened is closed
            self.cancel()
