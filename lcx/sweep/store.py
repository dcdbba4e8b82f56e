"""Rows on disk: one SQLite file, one transaction a row, so that a killed sweep loses nothing it had finished."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lcx.errors import UserError

SCHEMA = 1


class Store:
    """Rows by key in `<workdir>/rows.sqlite`.

    Raises:
      UserError: the folder cannot be written, or the file is not such a store or one of another version.
    """

    def __init__(self, workdir: Path):
        self.path = workdir / "rows.sqlite"
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"workdir={str(workdir)!r} cannot be made: {error.strerror}") from None
        with self._open() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA):
                raise UserError(f"workdir: {self.path} has schema {version}, this version reads {SCHEMA}")
            db.execute("CREATE TABLE IF NOT EXISTS rows (key TEXT PRIMARY KEY, row TEXT NOT NULL) STRICT")
            db.execute(f"PRAGMA user_version = {SCHEMA}")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        db = None
        try:
            db = sqlite3.connect(self.path, timeout=30)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            with db:
                yield db
        except sqlite3.Error as error:
            raise UserError(f"workdir: {self.path} cannot be used: {error}; give another --workdir") from None
        finally:
            if db is not None:
                db.close()

    def put(self, key: str, row: Mapping[str, Any]) -> None:
        """Write a row; it is on disk when this returns.  A key that is there already keeps its row."""
        with self._open() as db:
            text = json.dumps(row, allow_nan=False)
            db.execute("INSERT INTO rows VALUES (?, ?) ON CONFLICT DO NOTHING", (key, text))

    def rows(self) -> dict[str, dict[str, Any]]:
        """Key -> row, in the order in which they were written."""
        with self._open() as db:
            return {key: json.loads(row) for key, row in db.execute("SELECT key, row FROM rows ORDER BY rowid")}
