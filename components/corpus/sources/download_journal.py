"""What is known about every address: kept on disk as soon as it is known, so a killed run goes on.

What was fetched is a fact about the address, whatever the settings were. A loss is remembered only
for the settings under which it happened: with others it is tried again.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from components.images.decoding import ImageHeader

_VERSION = 2
# Version 1 stays readable: its rows stand for bytes that would otherwise be fetched again.
_ADDED_BY_2 = "alter table outcomes add column header text"
# Without a rowid: every look-up is by the address, which is then found in one tree instead of two.
_TABLE = """\
create table if not exists outcomes (
  key text primary key,
  attempts integer not null,
  sha256 text, extension text, size_bytes integer,
  width integer, height integer, format text, integrity text,
  cause text, detail text, settings text,
  header text
) without rowid
"""


@dataclass(frozen=True)
class Stored:
    """An original in the store."""

    sha256: str
    extension: str
    size_bytes: int
    width: int | None
    """Of the header; None when it cannot be read."""
    height: int | None
    format: str | None
    integrity: str
    """ "ok", or why the header cannot be read."""
    header: ImageHeader | None = None
    """All that it says; None also where a journal of version 1 remembers only the size."""


@dataclass(frozen=True)
class Loss:
    """Why there is no image."""

    cause: str
    detail: str


class FetchFailed(Exception):
    """One attempt failed; `retry` says whether another can help."""

    def __init__(
        self, cause: str, detail: str, *, retry: bool = False, wait_s: float | None = None
    ) -> None:
        super().__init__(f"{cause}: {detail}")
        self.loss = Loss(cause, detail)
        self.retry = retry
        self.wait_s = wait_s


@dataclass(frozen=True)
class Outcome:
    """What became of one address."""

    attempts: int
    result: Stored | Loss


def _header(text: str | None) -> ImageHeader | None:
    if text is None:
        return None
    values = json.loads(text)
    return ImageHeader(**{**values, "notes": tuple(values["notes"])})


class DownloadJournal:
    """Outcomes by key (a normalised URL, or the place of an archive member) in one SQLite file.

    Args:
        path: created with its folder when missing.
        settings: fingerprint of what losses depend on.
    """

    def __init__(self, path: Path, settings: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        # Autocommit: `put` is a transaction of its own, since a kill may come after any of them.
        self._database = sqlite3.connect(path, isolation_level=None)
        # A write-ahead log survives the death of the process at any moment.
        self._database.execute("pragma journal_mode = wal")
        # No fsync per outcome: a power cut may lose the last ones, which are then fetched again.
        self._database.execute("pragma synchronous = normal")
        version = self._database.execute("pragma user_version").fetchone()[0]
        if version not in (0, 1, _VERSION):
            raise ValueError(f"{path}: written by another version ({version}); remove it")
        if version == 1:
            self._database.execute(_ADDED_BY_2)
        self._database.execute(f"pragma user_version = {_VERSION}")
        self._database.execute(_TABLE)

    def __enter__(self) -> DownloadJournal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._database.close()

    def get(self, key: str) -> Outcome | None:
        """The outcome, None if there is none yet (or only a loss under other settings)."""
        row = self._database.execute(
            "select attempts, sha256, extension, size_bytes, width, height, format, integrity, "
            "header, cause, detail, settings from outcomes where key = ?",
            (key,),
        ).fetchone()
        if row is None:
            return None
        attempts, *stored, header, cause, detail, settings = row
        if cause is None:
            return Outcome(attempts, replace(Stored(*stored), header=_header(header)))
        # With another limit of size or a longer patience the same address may give an image.
        return Outcome(attempts, Loss(cause, detail)) if settings == self._settings else None

    def put(self, *outcomes: tuple[str, Outcome]) -> None:
        """Remember outcomes by key; they outlive the process when this returns."""
        self._database.execute("begin")
        self._database.executemany(
            "insert or replace into outcomes values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [self._row(key, outcome) for key, outcome in outcomes],
        )
        self._database.execute("commit")

    def _row(self, key: str, outcome: Outcome) -> tuple[str | int | None, ...]:
        result = outcome.result
        values: tuple[str | int | None, ...]
        if isinstance(result, Stored):
            values = (
                result.sha256,
                result.extension,
                result.size_bytes,
                result.width,
                result.height,
                result.format,
                result.integrity,
                None,
                None,
            )
        else:
            values = (*(None,) * 7, result.cause, result.detail)
        header = result.header if isinstance(result, Stored) else None
        text = None if header is None else json.dumps(vars(header))
        return key, outcome.attempts, *values, self._settings, text
