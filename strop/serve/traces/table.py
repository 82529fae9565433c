"""Comma-separated files with a header: columns by name, fields as numbers."""

import csv
from typing import ClassVar

from strop.core.errors import StropError
from strop.serve.traces.base import MAX_TOKENS, Loader, whole

DIGITS = 18
"""Most digits of a whole number; what has more is over every bound."""


class TableLoader(Loader):
    """A loader of rows under a header."""

    columns: ClassVar[tuple[str, ...]]
    """Names of time, prompt tokens and output tokens; others may stand between them."""

    def __init__(self, header: list[str]) -> None:
        self._width = len(header)
        self._places = [header.index(name) for name in self.columns]

    def fields(self, line: str) -> tuple[str, int, int]:
        """Time as text, prompt tokens and output tokens. Raises StropError."""
        values = split(line)
        if len(values) != self._width:
            raise StropError(f"it has {len(values)} fields under a header of {self._width}")
        time, prompt, output = (values[place] for place in self._places)
        return time, _tokens(self.columns[1], prompt), _tokens(self.columns[2], output)


def split(line: str) -> list[str]:
    """The fields of a line. Raises StropError where quotes or lengths are wrong."""
    try:
        return [field.strip() for field in next(csv.reader([line], strict=True))]
    except csv.Error as error:
        raise StropError(f"it is not a row of comma-separated values ({error})") from error


def _tokens(name: str, text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= DIGITS else text
    return whole(name, number, 1, MAX_TOKENS)
