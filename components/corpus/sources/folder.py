"""A local folder as a source of candidates: every file becomes a manifest row, good or bad."""

from __future__ import annotations

import csv
import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from components.corpus.sources.image_probe import header_columns
from components.images.decoding import ImageUndecodable, read_header
from components.settings.corpus import IngestSettings
from components.telemetry.progress import track

# Attribution CSV column -> manifest column.
_ATTRIBUTION_COLUMNS = {
    "author": "photographer",
    "author_url": "photographer_url",
    "license": "license",
    "repository": "source",
    "source": "source",
    "image_url": "image_url",
    "work_url": "work_url",
    "query": "query",
}
# The largest pixels there are (four 32-bit channels), and room for profiles and thumbnails: what is
# larger is not read into memory.
_MAX_BYTES_PER_PIXEL = 16
_MAX_METADATA_BYTES = 64 * 2**20
_LOOP = "symbolic links in a loop"


def source_folder(settings: IngestSettings, root: Path) -> Path:
    """The folder that `ingest.source` names, relative to `root` unless absolute.

    Raises:
        ValueError: it is missing, not a folder, or may not be listed.
    """
    folder = root / settings.source
    advice = "point ingest.source at a folder of photographs"
    if not folder.exists():
        raise ValueError(f"{settings.source}: no such folder; {advice}")
    if not folder.is_dir():
        raise ValueError(f"{settings.source}: not a folder; {advice}")
    try:
        os.listdir(folder)
    except PermissionError:
        raise ValueError(
            f"{settings.source}: no permission to list this folder; allow it or {advice}"
        ) from None
    return folder


def _walk(folder: Path, settings: IngestSettings) -> list[Path]:
    """Candidate files in sorted order; linked folders are listed as they are, never entered."""
    candidates: list[Path] = []

    def unreadable(problem: OSError) -> None:
        raise ValueError(
            f"{problem.filename}: {problem.strerror}; every folder under ingest.source "
            f"({settings.source}) must be readable"
        )

    for current, folders, files in os.walk(folder, onerror=unreadable):
        here = Path(current)
        candidates += [
            here / name for name in files if Path(name).suffix.lower() in settings.extensions
        ]
        if not settings.recursive:
            break
        candidates += [here / name for name in folders if (here / name).is_symlink()]
    return sorted(candidates, key=lambda path: path.relative_to(folder).as_posix())


def _printable(name: str) -> str:
    r"""Bytes of a name that are not UTF-8 as \xNN, so that it can be stored."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _uri(path: Path, root: Path) -> str:
    """Relative to the repository root when inside it, else absolute; always with slashes."""
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.as_posix()


def _unusable(path: Path, folder: Path, settings: IngestSettings) -> str | None:
    """Why a file is not even read; None when it can be."""
    if _printable(path.as_posix()) != path.as_posix():
        return "file name is not UTF-8; rename the file"
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return "symbolic link that leaves the source folder; not followed"
        status = path.stat()
    except RuntimeError:
        # Until Python 3.12 `resolve` names a loop by this; from 3.13 on `stat` does, as below.
        return _LOOP
    except OSError as problem:
        return _LOOP if problem.errno == errno.ELOOP else f"cannot read: {problem.strerror}"
    if stat.S_ISDIR(status.st_mode):
        return "linked folder; not followed"
    if not stat.S_ISREG(status.st_mode):
        # Reading a pipe would wait for ever.
        return "not a regular file"
    if status.st_size > settings.max_megapixels * 1e6 * _MAX_BYTES_PER_PIXEL + _MAX_METADATA_BYTES:
        return f"file of {status.st_size} bytes is larger than any image within max_megapixels"
    return None


def _probe(path: Path, folder: Path, settings: IngestSettings) -> tuple[str | None, dict[str, Any]]:
    """(sha256 of the bytes or None, header columns with `integrity`)."""
    if (reason := _unusable(path, folder, settings)) is not None:
        return None, {"integrity": reason}
    try:
        data = path.read_bytes()
    except OSError as problem:
        return None, {"integrity": f"cannot read: {problem.strerror}"}
    digest = hashlib.sha256(data).hexdigest()
    try:
        header = read_header(data, max_megapixels=settings.max_megapixels)
    except ImageUndecodable as problem:
        return digest, {"integrity": str(problem)}
    return digest, {**header_columns(header, len(data)), "integrity": "ok"}


def read_attribution(path: Path) -> dict[str, dict[str, str]]:
    """Read author and licence by file (path below the source folder, with slashes).

    Raises:
        ValueError: missing file, no `file` column, or a file named twice (with its line).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(
            f"{path.name}: attribution file not found in ingest.source; add it or set "
            "ingest.attribution to null"
        ) from None
    reader = csv.DictReader(text.splitlines())
    if "file" not in (reader.fieldnames or []):
        raise ValueError(f"{path.name}: needs a column 'file', has {reader.fieldnames}")
    rows: dict[str, dict[str, str]] = {}
    for record in reader:
        name = record["file"]
        if name in rows:
            raise ValueError(f"{path.name} line {reader.line_num}: {name!r} is listed twice")
        rows[name] = {
            column: record[key] for key, column in _ATTRIBUTION_COLUMNS.items() if record.get(key)
        }
    return rows


def _duplicate_of(digest: str | None, seen: Mapping[str, str]) -> str | None:
    return digest if digest is not None and digest in seen else None


def scan_folder(settings: IngestSettings, root: Path) -> pd.DataFrame:
    """List, hash and probe every candidate below `ingest.source`.

    A file that cannot be used is a row whose `integrity` says why. A byte-identical copy shares its
    image_id and has `duplicate_of` set; the first in path order is the original. A file whose bytes
    cannot be had gets the hash of its name as image_id.

    Returns:
        manifest columns known so far, one row per file, sorted by path.

    Raises:
        ValueError: folder missing, unreadable or without candidates; broken attribution file.
    """
    folder = source_folder(settings, root)
    paths = _walk(folder, settings)
    if not paths:
        raise ValueError(
            f"{settings.source}: no files ending in {', '.join(settings.extensions)}; point "
            "ingest.source at a folder of photographs"
        )
    attribution = read_attribution(folder / settings.attribution) if settings.attribution else {}
    seen: dict[str, str] = {}
    rows = []
    for path in track(paths, "ingest"):
        name = _printable(path.relative_to(folder).as_posix())
        digest, columns = _probe(path, folder, settings)
        rows.append(
            {
                "image_id": digest or hashlib.sha256(f"unreadable:{name}".encode()).hexdigest(),
                "uri": _printable(_uri(path, root)),
                "duplicate_of": _duplicate_of(digest, seen),
                "source": Path(settings.source).name,
                **columns,
                **attribution.get(name, {}),
            }
        )
        if digest is not None:
            seen.setdefault(digest, name)
    return pd.DataFrame(rows)


def file_name(uri: str, folder: Path, root: Path) -> str:
    """Path of a manifest's `uri` below the source folder, with slashes.

    Raises:
        ValueError: the file is not below the folder.
    """
    try:
        return (root / uri).relative_to(folder).as_posix()
    except ValueError:
        raise ValueError(f"{uri}: not below ingest.source; run the ingest stage again") from None
