"""Measurements that outlive the process: one SQLite file in WAL mode, one row a measurement.

A row is written when its measurement is complete, so a killed run loses at most the one in progress, and two
runs may share a file.
"""

import json
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

from strop.core.errors import StropError, reason

WAIT = 60.0
"""Seconds to wait for another process that is writing."""
LEAST = 256 << 10
"""Bytes that SQLite may want at once, beside the file and in it."""

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
            self.connection = sqlite3.connect(path, timeout=WAIT)
            self._use_wal()
            self.connection.execute(SCHEMA)
            self.connection.execute(f"SELECT {COLUMNS} FROM results LIMIT 0")
            self.connection.commit()
        except (OSError, sqlite3.Error) as error:
            raise StropError(
                f"cannot keep results in {path} ({_told(path, error)}): name another folder, or move the "
                "file away"
            ) from error
        self.path = path

    def _use_wal(self) -> None:
        """Switch to WAL mode. SQLite does not wait for a rival that is switching as well, so this does."""
        deadline = time.monotonic() + WAIT
        while True:
            try:
                self.connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def get(self, key: str) -> dict[str, Any] | None:
        """The measurement of this key, or None."""
        try:
            found = self.connection.execute("SELECT row FROM results WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise StropError(f"cannot read {self.path}: {_told(self.path, error)}") from error
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
            raise StropError(f"cannot write {self.path}: {_told(self.path, error)}") from error

    def close(self) -> None:
        """Close the file."""
        self.connection.close()


def _told(path: Path, error: Exception) -> str:
    """What went wrong. SQLite calls a full disk an I/O error where it cannot grow the index of its log."""
    if "I/O" in str(error) and shutil.disk_usage(path.parent).free < LEAST:
        return "the disk is full"
    return reason(error)
