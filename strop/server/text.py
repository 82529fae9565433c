"""Text as it comes: whole characters only, and nothing that may yet turn out to be a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"
"""How a tokenizer writes bytes that are no character, or none yet."""
PATIENCE = 16
"""Tokens after which bytes that became no character are written as they are; a character has 4 bytes."""


class TextStream:
    """Turns tokens into text piece by piece.

    The pieces joined are what decoding all at once gives, unless `PATIENCE` tokens in a row are bytes of no
    character: these are written in parts, whose marks for what cannot be read may differ in number.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.tokens: list[int] = []
        """The newest tokens: `known` ones that are written and say how the next are spaced, and those."""
        self.known = 0
        self.held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped = False
        """Whether a stop string came; what follows it is dropped."""

    def add(self, token: int) -> str:
        """The text that is certain with one token more."""
        self.tokens.append(token)
        before, text = self._decode(self.known), self._decode(len(self.tokens))
        waiting = len(self.tokens) - self.known
        if text.endswith(UNFINISHED) and waiting < PATIENCE:
            return ""
        self.tokens, self.known = self.tokens[self.known :], waiting
        return self._pass(text[len(before) :])

    def end(self) -> str:
        """The text that was held back, once no token follows."""
        rest = self._decode(len(self.tokens))[len(self._decode(self.known)) :]
        self.known = len(self.tokens)
        text = self._pass(rest) + ("" if self.stopped else self.held)
        self.held = ""
        return text

    def _decode(self, count: int) -> str:
        return str(self.tokenizer.decode(self.tokens[:count], skip_special_tokens=True)) if count else ""

    def _pass(self, text: str) -> str:
        """What of the text held and new can be told."""
        text = self.held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
