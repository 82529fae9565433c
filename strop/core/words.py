"""Numbers in words: percentages, ratios, bytes, times, intervals, and what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]
MISSING = "\N{EN DASH}"


def pick(row: Row, path: str) -> Any:
    """The value at a dotted path, or None where any part of the path is missing or null."""
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def ratio(value: float) -> str:
    """A ratio, finer below a tenth."""
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"


def percent(value: float) -> str:
    """A measured share of 1 in percent."""
    hundredths = 100 * value
    digits = 2 if 0 < abs(hundredths) < 10 else 1 if 0 < abs(hundredths) < 100 else 0
    return f"{hundredths:z.{digits}f}\N{NO-BREAK SPACE}%".replace("-", "\N{MINUS SIGN}")


def share(value: float) -> str:
    """A percentage that somebody chose, without trailing zeros."""
    return f"{100 * value:.6g}\N{NO-BREAK SPACE}%"


def size(value: float) -> str:
    """Bytes with a binary unit."""
    power = min(4, max(0, (int(abs(value)).bit_length() - 1) // 10))
    scaled = value / 1024**power
    digits = f"{scaled:.0f}" if power == 0 or scaled >= 1000 else f"{scaled:.3g}"
    return f"{digits}\N{NO-BREAK SPACE}{('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def small(value: float) -> str:
    """Two digits of a number that may be tiny."""
    digits = f"{value:#.2g}".rstrip(".") if value else "0"
    return digits.replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")


def seconds(value: float) -> str:
    """A time in seconds or milliseconds."""
    scaled, unit = (1000 * value, "ms") if value < 1 else (value, "s")
    digits = f"{scaled:,.0f}" if scaled >= 999.5 else f"{scaled:.3g}"
    return f"{digits}\N{NO-BREAK SPACE}{unit}"


def join(*parts: str) -> str:
    """The parts that are there, in one line."""
    return ", ".join(part for part in parts if part)


def shown(row: Row, path: str, show: Callable[[Any], str], wording: str = "{}") -> str:
    """The value at `path` in words, or nothing where it is missing."""
    value = pick(row, path)
    return "" if value is None else wording.format(show(value))


def between(low: float | None, high: float | None, show: Callable[[float], str]) -> str:
    """An interval, or nothing where it has no ends."""
    return "" if low is None or high is None else f"{show(low)} to {show(high)}"
