"""The table of features as a parquet file, with what it was measured on in the schema."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from strop.core.errors import StropError
from strop.core.files import atomic

KEPT = ("before", "after", "sae", "data", "regime", "command")
"""What the file says of the audit."""


def require_parquet() -> None:
    """Raise StropError where the package that writes parquet is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise StropError(
            "audits write a parquet file, and the package pyarrow is missing: pip install 'strop[audit]'"
        ) from error


def write_features(table: Mapping[str, np.ndarray], told: Mapping[str, Any], path: Path) -> None:
    """Write a row an active feature, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    about = json.dumps({name: told[name] for name in KEPT}, default=str)
    columns = pyarrow.table(dict(table)).replace_schema_metadata({"strop": about})
    with atomic(path) as draft:
        pyarrow.parquet.write_table(columns, draft)
