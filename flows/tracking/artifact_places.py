"""Artifacts of the embedded store lie below the clone, wherever it has been copied or moved to.

MLflow writes down absolute places once: of an experiment, of each run and of each model. The copy
of a clone would send its artifacts to the original, and look for old ones there.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from flows.tracking.store_problems import refuse_damaged
from flows.tracking.tier import sqlite_file

_PLACES = {
    "experiments": ["artifact_location"],
    "runs": ["artifact_uri"],
    "logged_models": ["artifact_location"],
    "model_versions": ["source", "storage_location"],
}
"""Columns by table; a store of an older MLflow has fewer of them."""
_PATIENCE_S = 15.0
"""For who writes there now; MLflow itself takes a second at most."""


def keep_artifacts_here(root: Path, store: str, artifacts: Path) -> None:
    """Bring what the embedded store says of places up to date; nothing where it is right.

    Args:
        root: repository root.
        store: the store's address; another one than a SQLite file keeps what it says.
        artifacts: where artifacts belong. A place that ends otherwise below its clone was chosen.

    Raises:
        DamagedStore: the file is no database.
        TrackingAway: another program holds it.
        sqlite3.Error: it cannot be written.
    """
    inside = artifacts.is_relative_to(root)
    if not (inside and store.startswith("sqlite:") and sqlite_file(store).is_file()):
        return
    here = artifacts.as_uri()
    ending = here.removeprefix(root.as_uri())
    file = sqlite_file(store)
    with closing(sqlite3.connect(file, timeout=_PATIENCE_S)) as database:
        try:
            with database:
                _move_all(database, here, ending)
        except sqlite3.DatabaseError as problem:
            refuse_damaged(store, problem)
            raise


def _move_all(database: sqlite3.Connection, here: str, ending: str) -> None:
    if not _columns(database, "experiments"):
        return
    places = database.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
    for (place,) in places:
        if place and place.startswith("file:") and place.endswith(ending) and place != here:
            _move(database, place, here)


def _columns(database: sqlite3.Connection, table: str) -> set[str]:
    return {str(row[1]) for row in database.execute(f"PRAGMA table_info({table})")}


def _move(database: sqlite3.Connection, before: str, here: str) -> None:
    for table, columns in _PLACES.items():
        for column in sorted(_columns(database, table).intersection(columns)):
            # Not LIKE: a folder's name may hold its wildcards.
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                f"WHERE substr({column} || '/', 1, ?) = ? || '/'",
                (here, len(before) + 1, len(before) + 1, before),
            )
