"""The results of a sweep: one SQLite file, one row a cell.

Only the sweeping process writes it; write-ahead logging lets others read meanwhile. A row is committed
before the next cell is taken up, so what a killed sweep finished is there. The manifest and the records of
the measured bundle are in the row too: a report needs the store alone.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xexport.core.errors import OutputError
from xexport.sweep.plan import Cell

__all__ = ["STORE_NAME", "Row", "Store", "open_store"]

STORE_NAME = "sweep.sqlite"
_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS cells (
  id TEXT PRIMARY KEY,
  model TEXT NOT NULL,
  target TEXT NOT NULL,
  preset TEXT,
  digest TEXT NOT NULL,
  status TEXT NOT NULL CHECK (status IN ('planned', 'exported', 'done', 'failed', 'not run')),
  error TEXT,
  figures TEXT,
  bundle TEXT,
  exported_on TEXT,
  machine TEXT,
  exports INTEGER NOT NULL DEFAULT 0,
  measurements INTEGER NOT NULL DEFAULT 0,
  seconds REAL NOT NULL DEFAULT 0,
  manifest BLOB,
  records BLOB,
  updated TEXT NOT NULL
)
"""


@dataclass(frozen=True)
class Row:
    """A cell as the store has it.

    Attributes:
        id, model, target, preset, digest: of the cell.
        status: ``planned``, ``exported`` (not measured yet), ``done``, ``failed``, or ``not run`` (exported,
            if a worker could, but no worker can run it).
        error: what, got, allowed, fix, kind (``refused``: again the same; ``crashed``: worth another try).
        figures: plain data: accuracy, speed, memory, placement.
        bundle: its folder; on the sweeping machine, or else on ``exported_on``.
        exported_on, machine: host names of where it was exported and where it was measured.
        exports, measurements: how often each was begun.
        seconds: of work, all stages together.
        manifest, records: of the measured bundle, as manifest.json and results.jsonl have them.
        updated: UTC, ISO 8601.
    """

    id: str
    model: str
    target: str
    preset: str | None
    digest: str
    status: str
    error: dict[str, Any] | None
    figures: dict[str, Any] | None
    bundle: str | None
    exported_on: str | None
    machine: str | None
    exports: int
    measurements: int
    seconds: float
    manifest: bytes | None
    records: bytes | None
    updated: str


class Store:
    """An open store; close it, or use it as a context manager."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.path = path
        self._connection = connection

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is left in the log and let go of the file."""
        self._connection.close()

    def plan(self, cells: Iterable[Cell]) -> None:
        """Add cells that are new; one whose digest changed begins anew."""
        for cell in cells:
            known = self.get(cell.id)
            if known is not None and known.digest == cell.digest:
                continue
            values = {
                "id": cell.id,
                "model": cell.model,
                "target": cell.target,
                "preset": cell.preset,
                "digest": cell.digest,
                "status": "planned",
                "updated": _now(),
            }
            marks = ", ".join("?" * len(values))
            self._write(f"REPLACE INTO cells ({', '.join(values)}) VALUES ({marks})", tuple(values.values()))

    def get(self, key: str) -> Row | None:
        """The row of a cell."""
        rows = self._rows("SELECT * FROM cells WHERE id = ?", (key,))
        return rows[0] if rows else None

    def rows(self, keys: Iterable[str] | None = None) -> list[Row]:
        """All rows, or those of the cells named, in the order in which they were planned."""
        rows = self._rows("SELECT * FROM cells ORDER BY rowid", ())
        wanted = None if keys is None else set(keys)
        return [row for row in rows if wanted is None or row.id in wanted]

    def update(self, key: str, **values: Any) -> None:
        """Change a row and commit it."""
        told = {k: _plain(v) for k, v in {**values, "updated": _now()}.items()}
        names = ", ".join(f"{name} = ?" for name in told)
        self._write(f"UPDATE cells SET {names} WHERE id = ?", (*told.values(), key))

    def began(self, key: str, stage: str, seconds: float) -> None:
        """Count one more export or measurement and the time it took."""
        column = {"export": "exports", "measure": "measurements"}[stage]
        self._write(
            f"UPDATE cells SET {column} = {column} + 1, seconds = seconds + ? WHERE id = ?", (seconds, key)
        )

    def _rows(self, query: str, values: tuple[Any, ...]) -> list[Row]:
        try:
            found = self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise _unreadable(self.path, error) from error
        return [_row(one) for one in found]

    def _write(self, query: str, values: tuple[Any, ...]) -> None:
        try:
            with self._connection:
                self._connection.execute(query, values)
        except sqlite3.Error as error:
            raise OutputError("the store can't be written", got=f"{self.path}: {error}") from error


def open_store(folder: Path) -> Store:
    """The store of a sweep's folder, made if it is not there.

    Raises:
        OutputError: the folder or the file can't be made, is no store, is damaged, or of another version.
    """
    path = folder / STORE_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError("the sweep's folder can't be made", got=f"{folder}: {error.strerror}") from error
    connection: sqlite3.Connection | None = None
    try:
        connection = sqlite3.connect(path, timeout=30)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")  # a file system without it keeps its journal
        connection.execute("PRAGMA synchronous = FULL")
        _check(connection, path)
        with connection:
            connection.execute(_SCHEMA)
            connection.execute(f"PRAGMA user_version = {_VERSION}")
    except sqlite3.Error as error:
        _close(connection)
        raise _unreadable(path, error) from error
    except OutputError:
        _close(connection)
        raise
    return Store(connection, path)


def _check(connection: sqlite3.Connection, path: Path) -> None:
    (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if state != "ok":
        raise _unreadable(path, state)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in (0, _VERSION):
        raise OutputError(
            "the store is of another version of xexport",
            got=version,
            allowed=_VERSION,
            fix="name another --out, or sweep with the version that made it",
        )


def _close(connection: sqlite3.Connection | None) -> None:
    if connection is not None:
        with suppress(sqlite3.Error):
            connection.close()


def _unreadable(path: Path, error: object) -> OutputError:
    return OutputError(
        "the store of this sweep can't be read",
        got=f"{path}: {error}",
        fix="move it away and run the sweep again: everything is then made anew",
    )


def _row(found: sqlite3.Row) -> Row:
    values: dict[str, Any] = {f.name: found[f.name] for f in fields(Row)}
    for name in ("error", "figures"):
        values[name] = json.loads(values[name]) if values[name] else None
    return Row(**values)


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, Mapping) else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
