"""The table of a source: every file with size and sha256, photographs with their headers.

Nothing in it depends on where the source lies or on times, so clones of one corpus have the same
bytes. Times decide only what is read: a file is read once and not again until its size or times
change (`known_files`).

At a prompt, without the stage::

    settings = load_settings(Path("params.yaml"))
    table, limits = Path("listing.parquet"), EngineLimits.of(settings)
    describe_source(settings.ingest, table, root=Path(), limits=limits)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from components.corpus.listing import file_content
from components.corpus.listing.file_content import (
    HEADER_COLUMNS,
    FileContent,
    FileToRead,
    Stat,
    read_content,
    too_large,
)
from components.corpus.listing.known_files import KnownFiles
from components.corpus.listing.source_files import SourceFile, list_source, printable
from components.corpus.manifest import SCHEMA
from components.corpus.sources import image_probe
from components.engine.map_items import EngineLimits, code_digest, open_pool
from components.engine.ordered_pool import Failure
from components.files.parquet_files import RowStream
from components.files.whole_files import write_text
from components.images import decoding
from components.settings.corpus import IngestSettings
from components.telemetry.progress import track

STATE = Path("runs", "listing")
"""Below a repository: what is known of files, and what the last table was made of."""
KNOWN_FILES = STATE / "files.sqlite"
_MIB = 2**20
_FILES_PER_WORKER = 64
_LARGEST_BESIDE_BYTES = 16 * 2**30
"""What lies beside photographs and is larger is none of their captions or licences."""

TABLE_SCHEMA = pa.schema(
    [
        # Path below the source, with slashes; \xNN for bytes that are not UTF-8.
        pa.field("name", pa.string(), nullable=False),
        # Whether ingest makes a row of it; else it lies beside the photographs, or is a list or
        # an archive.
        pa.field("is_candidate", pa.bool_(), nullable=False),
        ("size_bytes", pa.int64()),
        ("sha256", pa.string()),
        *(SCHEMA.field(name) for name in HEADER_COLUMNS),
    ]
)


@dataclass(frozen=True)
class Described:
    """What is under a source."""

    files: int
    candidates: int
    read: int
    """Files whose bytes were read now; the others were known."""
    unusable: dict[str, int]
    """Files that cannot be used as photographs, lists or captions, by reason, commonest first."""


def describe_source(
    settings: IngestSettings, table: Path, *, root: Path, limits: EngineLimits
) -> Described:
    """List `ingest.source`, read what is new or changed, and write the table.

    A table with the same rows stays as it is, whichever library wrote its bytes. A run that was
    killed goes on where it was.

    Args:
        settings: the source.
        table: Parquet file of `TABLE_SCHEMA`, sorted by name.
        root: where relative paths start; `STATE` below it survives kills.
        limits: of the workers that read photographs.

    Raises:
        ValueError: no usable source; one line.
    """
    files = list_source(settings, root)
    place = root / settings.source
    base = place.parent if place.is_file() else place
    unusable: Counter[str] = Counter()
    with KnownFiles(root / KNOWN_FILES, _reading(settings)) as known:
        reading = _Reading(settings, base, known, limits)
        read = reading.read_new(files)
        # A generator: with six million files only their names and stats are in memory.
        rows = (_row(file, reading.content(file), unusable) for file in files)
        _write_unless_equal(rows, table)
    note = {
        "listed": _digest(files, settings),
        "table": _md5(table),
        "to_read_again": reading.to_read_again,
    }
    # After the table: a note of a table that is not there yet would make a run skip it.
    write_text(root / STATE / "written.json", json.dumps(note), contended=True)
    return Described(
        files=len(files),
        candidates=sum(file.is_candidate for file in files),
        read=read,
        unusable=dict(unusable.most_common()),
    )


def known_table(settings: IngestSettings, root: Path) -> str | None:
    """The md5 of the table that `describe_source` would write, when no file has to be read for it.

    Nothing is opened: names, sizes and times are compared with those of the last time.

    Raises:
        ValueError: no usable source; one line.
    """
    try:
        note = json.loads((root / STATE / "written.json").read_text(encoding="utf-8"))
        listed, table, again = note["listed"], str(note["table"]), note["to_read_again"]
    except (OSError, ValueError, KeyError, TypeError):
        # Never listed in this clone, or the note is damaged: it is made again.
        return None
    if again or listed != _digest(list_source(settings, root), settings):
        return None
    return table


class _Reading:
    """Contents of a source's files: known ones, and new ones read side by side."""

    def __init__(
        self, settings: IngestSettings, base: Path, known: KnownFiles, limits: EngineLimits
    ) -> None:
        self._settings = settings
        # A working tree's link to the folder of another clone: its files are known by that name.
        # A text: joining paths cost a fifth of the whole listing.
        self._base = str(base.resolve())
        self._known = known
        self._limits = limits
        self._unkept: dict[str, FileContent] = {}
        """What changed while it was read, or could not be read now."""

    @property
    def to_read_again(self) -> int:
        """Files of which another run may find something else although nothing about them changes.

        Permission is none of these: giving it changes a time.
        """
        refused = f"cannot read: {os.strerror(errno.EACCES)}"
        return sum(one.columns["integrity"] != refused for one in self._unkept.values())

    def content(self, file: SourceFile) -> FileContent:
        """What is in a file, after `read_new`."""
        if (problem := self._unread(file)) is not None:
            return FileContent(None, None, {"integrity": problem})
        return self._unkept.get(file.name) or self._find(file) or _VANISHED

    def read_new(self, files: Sequence[SourceFile]) -> int:
        """Read all files that are not known; their number."""
        new = [file for file in files if self._unread(file) is None and self._find(file) is None]
        photographs = [file for file in new if file.is_candidate]
        others = [file for file in new if not file.is_candidate]
        steps = chain(self._in_threads(others), self._in_workers(photographs))
        for _ in track(steps, "source", total=len(new)):
            pass
        return len(new)

    def _in_threads(self, files: Sequence[SourceFile]) -> Iterator[None]:
        """Hash what no decoder looks at: lists, archives, captions."""
        with ThreadPoolExecutor(max(1, self._limits.workers)) as pool:
            contents = pool.map(read_content, map(self._to_read, files))
            for file, content in zip(files, contents, strict=True):
                self._keep(file, content)
                yield

    def _in_workers(self, files: Sequence[SourceFile]) -> Iterator[None]:
        """Hash and probe photographs in worker processes, each kept as soon as it is there."""
        if not files:
            return
        largest_mb = max(file.size_bytes for file in files) // _MIB
        limits = replace(
            self._limits,
            # A process costs more to start than a few photographs cost to read.
            workers=min(self._limits.workers, 1 + len(files) // _FILES_PER_WORKER),
            # The bytes, and what a decoder copies of them.
            memory_mb=max(self._limits.memory_mb, 2 * largest_mb + 512),
            # Actors on other machines need not see the folder.
            ray=None,
        )

        def keep(number: int, result: FileContent | Failure) -> None:
            if isinstance(result, Failure):
                reason = f"quarantined: {result.message}"
                result = FileContent(None, None, {"integrity": reason})
            self._keep(files[number], result)

        payloads = (self._to_read(file) for file in files)
        with closing(open_pool(read_content, limits).map(payloads, keep)) as results:
            for _ in results:
                yield

    def _keep(self, file: SourceFile, content: FileContent) -> None:
        self._known.put(self._path(file), content, is_candidate=file.is_candidate)
        # Changed between listing and reading: the table holds what was read, the note says "again".
        if content.stat is None or content.stat != _stat(file):
            self._unkept[file.name] = content

    def _find(self, file: SourceFile) -> FileContent | None:
        return self._known.get(self._path(file), _stat(file), is_candidate=file.is_candidate)

    def _unread(self, file: SourceFile) -> str | None:
        """Why a file is not opened; None when it is."""
        if file.problem is not None:
            return file.problem
        if file.is_candidate:
            return too_large(file.size_bytes, self._settings.max_megapixels)
        if self._settings.kind == "folder" and file.size_bytes > _LARGEST_BESIDE_BYTES:
            return f"file of {file.size_bytes} bytes beside the photographs is not read"
        return None

    def _path(self, file: SourceFile) -> bytes:
        return os.fsencode(os.path.join(self._base, file.name))

    def _to_read(self, file: SourceFile) -> FileToRead:
        limit = self._settings.max_megapixels if file.is_candidate else None
        return FileToRead(os.path.join(self._base, file.name), limit)


_VANISHED = FileContent(None, None, {"integrity": "changed while it was read"})


def _row(file: SourceFile, content: FileContent, unusable: Counter[str]) -> dict[str, Any]:
    # pyarrow drops keys that its schema lacks, without a word.
    if unknown := sorted(set(content.columns) - set(HEADER_COLUMNS)):
        raise ValueError(f"header columns {unknown} are not in HEADER_COLUMNS")
    if content.columns["integrity"] != "ok":
        unusable[content.columns["integrity"]] += 1
    # Of the bytes that were hashed, where another file had taken this one's place by then.
    size_bytes = file.size_bytes if content.stat is None else content.stat[0]
    return {
        "name": printable(file.name),
        "is_candidate": file.is_candidate,
        "size_bytes": None if file.problem else size_bytes,
        "sha256": content.sha256,
        **content.columns,
    }


def _write_unless_equal(rows: Iterable[dict[str, Any]], path: Path) -> None:
    new = path.with_name(f".{path.name}.new")
    with RowStream(new, TABLE_SCHEMA) as stream:
        for row in rows:
            stream.add(row)
    # DVC hashes the file: other bytes with the same rows (another version of pyarrow) would make
    # every later stage stale.
    if path.exists() and _same_rows(path, new):
        new.unlink()
    else:
        new.replace(path)


def _same_rows(path: Path, other: Path) -> bool:
    if _md5(path) == _md5(other):
        return True
    try:
        return bool(pq.read_table(path).equals(pq.read_table(other)))
    except pa.ArrowInvalid:
        # Damaged, or no table at all.
        return False


def _stat(file: SourceFile) -> Stat:
    return file.size_bytes, file.mtime_ns, file.ctime_ns


def _reading(settings: IngestSettings) -> str:
    """Names how a header is read: another code or bound reads all photographs again."""
    code = code_digest(decoding, *decoding.DECIDING_MODULES, image_probe, file_content)
    return f"{code[:16]} {settings.max_megapixels:g}"


def _digest(files: Sequence[SourceFile], settings: IngestSettings) -> str:
    """Over everything that decides the table, as far as it is known without reading."""
    digest = hashlib.sha256(f"{_reading(settings)} {settings.kind} {settings.source}".encode())
    for file in files:
        line = "\0".join(map(str, file)) + "\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def read_listing(path: Path, *, candidates_only: bool = True) -> pd.DataFrame:
    """The table as a frame, sorted by name.

    Args:
        path: written by `describe_source`.
        candidates_only: leave out what lies beside the photographs.
    """
    frame = pq.read_table(path).to_pandas()
    return frame[frame["is_candidate"]].reset_index(drop=True) if candidates_only else frame
