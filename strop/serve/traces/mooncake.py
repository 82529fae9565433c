"""Mooncake's traces (arXiv 2407.00079): JSON Lines in milliseconds, with chained hashes of prompt blocks."""

import json

from strop.core.errors import StropError, quoted
from strop.serve.traces.base import MAX_ID, MAX_TOKENS, Loader, Row, seconds, whole

BLOCK = 512
"""Tokens of a block in Mooncake's files."""


class Mooncake(Loader):
    """An object a request: timestamp, input_length, output_length, hash_ids."""

    per_second = 1000

    def row(self, line: str) -> Row:
        fields = _object(line)
        for name in ("timestamp", "input_length", "output_length", "hash_ids"):
            if name not in fields:
                raise StropError(f"it has no {name}")
        time = seconds("timestamp", fields["timestamp"], self.per_second)
        prompt = whole("input_length", fields["input_length"], 1, MAX_TOKENS)
        output = whole("output_length", fields["output_length"], 1, MAX_TOKENS)
        return Row(time, prompt, output, _hashes(fields["hash_ids"], -(-prompt // BLOCK)))


def _object(line: str) -> dict:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", "it is nested too deep or holds too long a number")
        raise StropError(f"it is not valid JSON ({why})") from error
    if not isinstance(fields, dict):
        raise StropError(f"it is not a JSON object but {quoted(fields)}")
    return fields


def _hashes(ids: object, needed: int) -> tuple[int, ...]:
    if not isinstance(ids, list) or set(map(type, ids)) - {int}:
        raise StropError(f"hash_ids must be a list of whole numbers, not {quoted(ids)}")
    if len(ids) != needed:
        raise StropError(
            f"hash_ids has {len(ids)} ids where input_length in blocks of {BLOCK} tokens takes {needed}"
        )
    if min(ids) < 0 or max(ids) >= MAX_ID:
        raise StropError("hash_ids must be from 0 to 2**63 - 1")
    return tuple(ids)
