"""Measurements that outlive the process: one SQLite file in WAL mode, one row a measurement.

A row is written when its measurement is complete, so a killed run loses at most the one in progress, and two
runs may share a file.
"""

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

from strop.core.errors import StropError

SCHEMA = """
CREATE TABLE IF NOT EXISTS results (
    key TEXT PRIMARY KEY,
    created REAL NOT NULL,
    model TEXT NOT NULL,
    model_fingerprint TEXT NOT NULL,
    recipe TEXT NOT NULL,
    data_fingerprint TEXT NOT NULL,
    seed INTEGER NOT NULL,
    code TEXT NOT NULL,
    label TEXT NOT NULL,
    status TEXT NOT NULL,
    row TEXT NOT NULL
)
"""
COLUMNS = "key, created, model, model_fingerprint, recipe, data_fingerprint, seed, code, label, status, row"
INSERT = f"INSERT OR REPLACE INTO results ({COLUMNS}) VALUES ({', '.join('?' * 11)})"


class ResultStore:
    """The `results` table of one file."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises StropError when the place cannot be written or is not SQLite."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(path, timeout=60)
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute(SCHEMA)
            self.connection.commit()
        except (OSError, sqlite3.Error) as error:
            raise StropError(f"cannot keep results in {path}: {error}") from error
        self.path = path

    def get(self, key: str) -> dict[str, Any] | None:
        """The measurement of this key, or None."""
        found = self.connection.execute("SELECT row FROM results WHERE key = ?", (key,)).fetchone()
        return None if found is None else json.loads(found[0])

    def put(self, key: str, names: dict[str, Any], row: dict[str, Any]) -> None:
        """Write one measurement, replacing an older one of the same key.

        `names` holds model, model_fingerprint, recipe, data_fingerprint, seed and code.
        """
        values = (
            key,
            time.time(),
            names["model"],
            names["model_fingerprint"],
            json.dumps(names["recipe"]),
            names["data_fingerprint"],
            names["seed"],
            names["code"],
            row["label"],
            row["status"],
            json.dumps(row),
        )
        try:
            with self.connection:
                self.connection.execute(INSERT, values)
        except sqlite3.Error as error:
            raise StropError(f"cannot write {self.path}: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self.connection.close()
