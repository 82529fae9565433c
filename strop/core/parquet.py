"""Columns as a parquet file, with what they were measured on in the schema."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from strop.core.errors import StropError
from strop.core.files import atomic


def require_parquet() -> None:
    """Raise StropError where the package that writes parquet is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise StropError(
            "the results include a parquet file, and the package pyarrow is missing: "
            "pip install 'strop[audit]'"
        ) from error


def write_parquet(table: Mapping[str, np.ndarray], about: Mapping[str, Any], path: Path) -> None:
    """Write columns `[N]`, whole or not at all; `about` is JSON in the schema under `strop`."""
    import pyarrow
    import pyarrow.parquet

    said = {"strop": json.dumps(about, default=str)}
    columns = pyarrow.table(dict(table)).replace_schema_metadata(said)
    with atomic(path) as draft:
        pyarrow.parquet.write_table(columns, draft)
