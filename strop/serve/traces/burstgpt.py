"""BurstGPT (arXiv 2401.17644): CSV with seconds from the start, no prefixes.

Failed requests have no response tokens there, which makes them bad rows here.
"""

from strop.serve.traces.base import Row, seconds
from strop.serve.traces.table import TableLoader


class BurstGPT(TableLoader):
    """A row a request; its model, total and kind are not used."""

    per_second = 1
    columns = ("Timestamp", "Request tokens", "Response tokens")

    def row(self, line: str) -> Row:
        time, prompt, output = self.fields(line)
        return Row(seconds("Timestamp", _number(time), self.per_second), prompt, output)


def _number(text: str) -> float | str:
    """The number that a text writes plainly; the text itself where it writes none."""
    try:
        return float(text) if text.isascii() and "_" not in text else text
    except ValueError:
        return text
