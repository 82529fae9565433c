"""Traces of Azure's LLM inference: CSV with absolute times of up to 100 ns digits, no prefixes.

Published with Splitwise (arXiv 2311.18677) under github.com/Azure/AzurePublicDataset.
"""

import re
from datetime import datetime, timedelta

from strop.core.errors import StropError, quoted
from strop.serve.traces.base import Row
from strop.serve.traces.table import TableLoader

TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,7}))?(?:Z|\+00:00)?"
)
SECOND = timedelta(seconds=1)


class Azure(TableLoader):
    """A row a request."""

    per_second = 10**7
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

    def row(self, line: str) -> Row:
        time, prompt, output = self.fields(line)
        return Row(_ticks(time), prompt, output)


def _ticks(text: str) -> int:
    """Units of 100 ns since the year 1, exact, which seconds as floats are not."""
    found = TIME.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        whole = (datetime.fromisoformat(found[1]) - datetime.min) // SECOND
    except ValueError as error:
        raise StropError(
            f"TIMESTAMP must be a UTC time like 2023-11-16 18:17:03.9799600, not {quoted(text)}"
        ) from error
    return whole * Azure.per_second + int((found[2] or "").ljust(7, "0"))
