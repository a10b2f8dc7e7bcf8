"""Artifacts of the embedded store lie below the clone, wherever it has been copied or moved to.

MLflow writes down absolute places once: of an experiment, of each run and of each model. The copy
of a clone would send its artifacts to the original, and look for old ones there.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

from flows.tracking.tier import sqlite_file

_PLACES = {
    "experiments": ["artifact_location"],
    "runs": ["artifact_uri"],
    "logged_models": ["artifact_location"],
    "model_versions": ["source", "storage_location"],
}
"""Columns by table; a store of an older MLflow has fewer of them."""
_DAMAGED = "file is not a database|database disk image is malformed"


class DamagedStore(RuntimeError):
    """The store's file is no database any more; one line that says what to do."""

    def __init__(self, file: Path, problem: object) -> None:
        """Of what SQLite says of the file."""
        super().__init__(
            f"{file} is damaged ({problem}): `ultraflux down`, move it aside and remove "
            "runs/records/*/mlflow.json, which name its runs; `ultraflux sync` then sends all "
            "records again"
        )


def refuse_damaged(store: str, problem: Exception) -> None:
    """Tell what MLflow's client says of a damaged file from a store that is away.

    Raises:
        DamagedStore: it is damaged.
    """
    if store.startswith("sqlite:") and (said := re.search(_DAMAGED, str(problem))):
        raise DamagedStore(sqlite_file(store), said[0]) from None


def keep_artifacts_here(root: Path, store: str, artifacts: Path) -> None:
    """Bring what the embedded store says of places up to date; nothing where it is right.

    Args:
        root: repository root.
        store: the store's address; another one than a SQLite file keeps what it says.
        artifacts: where artifacts belong. A place that ends otherwise below its clone was chosen.

    Raises:
        DamagedStore: the file is no database.
        sqlite3.Error: it cannot be written.
    """
    inside = artifacts.is_relative_to(root)
    if not (inside and store.startswith("sqlite:") and sqlite_file(store).is_file()):
        return
    here = artifacts.as_uri()
    ending = here.removeprefix(root.as_uri())
    file = sqlite_file(store)
    with closing(sqlite3.connect(file, timeout=60)) as database, database:
        try:
            if not _columns(database, "experiments"):
                return
        except sqlite3.DatabaseError as problem:
            refuse_damaged(store, problem)
            raise
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
