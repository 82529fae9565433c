"""The one exception that a user is meant to see, and how it quotes what came from outside."""

from typing import Any

QUOTED, REASON = 100, 300
"""Most characters of a value, and of another error, in a sentence."""
UNREAD = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
"""What PyYAML raises, besides its own, where a value is not of the type that its tag says."""


class StropError(Exception):
    """A mistake that the user can mend: one sentence that names the cause and the way out.

    The command line prints it without a traceback and exits with code 2.
    """


def quoted(value: Any) -> str:
    """A value from outside as a sentence quotes it: what Python writes for it, cut where that is long."""
    try:
        return _cut(repr(value), QUOTED)
    except (ValueError, RecursionError):  # a number of thousands of digits, or what is nested too deep
        return f"a {type(value).__name__} too large to show"


def reason(error: Exception) -> str:
    """What another error says, on one line, cut where it quotes much."""
    return _cut(" ".join(str(error).split()), REASON) or type(error).__name__


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
