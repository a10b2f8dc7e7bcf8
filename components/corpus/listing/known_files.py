"""What is known of files that were read before, by path, size and times: nothing is read twice.

One SQLite file below `runs/`, written as results come, so a killed run loses about a second's work.
"""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from types import TracebackType

from components.corpus.listing.file_content import FileContent, Stat

_COMMIT_EVERY_S = 1.0
_COLUMNS = "path, size, mtime, ctime, reading, sha256, columns"
_CREATE = """\
create table if not exists files (
    path blob primary key, size integer, mtime integer, ctime integer,
    reading text, sha256 text, columns text
) without rowid"""


class KnownFiles:
    """Content of files as it was read, kept over runs.

    Args:
        path: the database; a damaged one is begun anew.
        reading: names the code and settings by which headers are read.
    """

    def __init__(self, path: Path, reading: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._reading = reading
        try:
            self._database = self._opened(path)
        # It only saves time: a damaged one must not stand in the way of a run.
        except sqlite3.DatabaseError:
            path.unlink()
            self._database = self._opened(path)
        self._committed = time.monotonic()

    @staticmethod
    def _opened(path: Path) -> sqlite3.Connection:
        # Working trees that share a folder of photographs may write at once.
        database = sqlite3.connect(path, timeout=60)
        # What a power cut loses is read again.
        database.execute("pragma journal_mode = wal")
        database.execute("pragma synchronous = off")
        database.execute(_CREATE)
        return database

    def __enter__(self) -> KnownFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._database.commit()
        self._database.close()

    def get(self, path: bytes, stat: Stat, *, is_candidate: bool) -> FileContent | None:
        """What a file with this stat holds; None: it has to be read."""
        found = self._database.execute(
            "select size, mtime, ctime, reading, sha256, columns from files where path = ?", (path,)
        ).fetchone()
        # ctime too: mtime can be set back (`touch -d`, unpacking), ctime cannot.
        if found is None or found[:3] != stat or (found[3] or None) != self._mode(is_candidate):
            return None
        return FileContent(found[4], stat, json.loads(found[5]))

    def put(self, path: bytes, content: FileContent, *, is_candidate: bool) -> None:
        """Keep what was read; what changed while it was read is not kept."""
        if content.stat is None:
            return
        row = (
            path,
            *content.stat,
            self._mode(is_candidate) or "",
            content.sha256,
            json.dumps(content.columns),
        )
        self._database.execute(
            f"insert or replace into files ({_COLUMNS}) values (?, ?, ?, ?, ?, ?, ?)", row
        )
        if time.monotonic() - self._committed > _COMMIT_EVERY_S:
            self._database.commit()
            self._committed = time.monotonic()

    def _mode(self, is_candidate: bool) -> str | None:
        """Only photographs depend on how headers are read."""
        return self._reading if is_candidate else None
