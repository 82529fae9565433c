"""One sequence that a request asks for, from the queue to its last token."""

import time
from collections.abc import Callable
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
    note: Callable[["Row"], None] = lambda row: None
    """Measures each token; the engine's."""
    cancelled: bool = False
    finish: Finish | None = None
    tokens: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    latest: float = 0.0
    """When the newest token came."""

    @property
    def over(self) -> bool:
        """Whether nothing more is to be written."""
        return self.cancelled or self.finish is not None

    @property
    def position(self) -> int:
        """Where the next token goes."""
        return len(self.prompt) + self.tokens

    def take(self, token: int) -> None:
        """Write one token."""
        self.tokens += 1
        text = self.text.add(token)
        if self.text.stopped or token in self.ends:
            self.finish = "stop"
        elif self.tokens >= self.most:
            self.finish = "length"
        if self.finish is not None and not self.text.stopped:
            text += self.text.end()
            self.finish = "stop" if self.text.stopped else self.finish
        self.note(self)
        if text or self.finish is not None:
            self._tell(Piece(text, self.tokens, self.finish))

    def fail(self, sentence: str) -> None:
        """Say that no more will come, and why."""
        self.finish = "error"
        self._tell(Piece(sentence, self.tokens, "error"))

    def _tell(self, piece: Piece) -> None:
        try:
            self.tell(piece)
        except RuntimeError:  # the event loop that listened is closed
            self.cancelled = True
