"""The table of features as a parquet file, with what it was measured on in the schema."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from strop.core.parquet import write_parquet

KEPT = ("before", "after", "sae", "data", "regime", "command")
"""What the file says of the audit."""


def write_features(table: Mapping[str, np.ndarray], told: Mapping[str, Any], path: Path) -> None:
    """Write a row an active feature, whole or not at all."""
    write_parquet(table, {name: told[name] for name in KEPT}, path)
