"""What the bytes of one file are: their sha256, and for a photograph what its header says.

Each file is read once. A header is the first untrusted thing that a decoder sees, so photographs
are read in worker processes.
"""

from __future__ import annotations

import hashlib
import os
import time
from typing import Any, NamedTuple

from components.corpus.sources.image_probe import header_columns
from components.files.whole_files import NotRegularFile, open_regular
from components.images.decoding import ImageUndecodable, read_header

HEADER_COLUMNS = (
    "width",
    "height",
    "megapixels",
    "aspect_ratio",
    "stored_width",
    "stored_height",
    "orientation",
    "color_space",
    "bit_depth",
    "has_alpha",
    "format",
    "bytes_per_pixel",
    "integrity",
    "decode_note",
)
"""Columns of the manifest that a photograph's header fills: those of `header_columns`, and
`integrity`."""

# The largest pixels there are (four 32-bit channels), and room for profiles and thumbnails: what is
# larger is not read into memory.
_MAX_BYTES_PER_PIXEL = 16
_MAX_METADATA_BYTES = 64 * 2**20
_CHUNK_BYTES = 2**20
_CLOCK_STEP_NS = 20_000_000
"""A kernel stamps files with a clock that moves every 4 to 10 ms."""

_ATTEMPTS = 3

Stat = tuple[int, int, int]
"""Size, mtime and ctime in ns: equal ones stand for equal bytes."""


class FileToRead(NamedTuple):
    """What a worker needs to know of one file."""

    path: str
    max_megapixels: float | None
    """Of a photograph; None: no header is read."""


class FileContent(NamedTuple):
    """What was found in a file."""

    sha256: str | None
    """None: its bytes could not be had."""
    stat: Stat | None
    """Of the file while it was read; None: it changed meanwhile, or could not be opened."""
    columns: dict[str, Any]
    """`HEADER_COLUMNS` as far as they are known; of other files `integrity` alone."""


_CHANGED = FileContent(None, None, {"integrity": "changed while it was read"})


def too_large(size_bytes: int, max_megapixels: float) -> str | None:
    """Why a file is not even read: no photograph within the bound has so many bytes."""
    if size_bytes > max_megapixels * 1e6 * _MAX_BYTES_PER_PIXEL + _MAX_METADATA_BYTES:
        return f"file of {size_bytes} bytes is larger than any image within max_megapixels"
    return None


def read_content(file: FileToRead) -> FileContent:
    """Read a file once; what is wrong with it is data.

    A file that was written less than a step of the kernel's clock ago is waited for: a later change
    must get another time. One that changes while it is read is read again, at most `_ATTEMPTS`
    times in all: bytes of two moments are no photograph.
    """
    for _ in range(_ATTEMPTS):
        content = _read_once(file)
        if content is not _CHANGED:
            break
    return content


def _read_once(file: FileToRead) -> FileContent:
    data: bytes | None = None
    try:
        # What was a file when it was listed may be a pipe by now.
        with open_regular(file.path) as opened:
            # The stat of the descriptor, not of the name: it belongs to the bytes that are read.
            status = os.fstat(opened.fileno())
            if 0 <= time.time_ns() - status.st_ctime_ns < _CLOCK_STEP_NS:
                time.sleep(_CLOCK_STEP_NS / 1e9)
            if file.max_megapixels is None:
                digest = hashlib.sha256()
                while chunk := opened.read(_CHUNK_BYTES):
                    digest.update(chunk)
            else:
                data = opened.readall()
                digest = hashlib.sha256(data)
            # Also when another file took its name: the one that is read lost it, which is a change.
            if _stat(status) != _stat(os.fstat(opened.fileno())):
                return _CHANGED
    except (NotRegularFile, IsADirectoryError):
        return FileContent(None, None, {"integrity": "not a regular file"})
    except OSError as problem:
        return FileContent(None, None, {"integrity": f"cannot read: {problem.strerror}"})
    if data is None or file.max_megapixels is None:
        columns: dict[str, Any] = {"integrity": "ok"}
    else:
        columns = _photograph(data, file.max_megapixels)
    return FileContent(digest.hexdigest(), _stat(status), columns)


def _stat(status: os.stat_result) -> Stat:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _photograph(data: bytes, max_megapixels: float) -> dict[str, Any]:
    """Columns of the manifest that the header gives; `integrity` says why there are no others."""
    try:
        header = read_header(data, max_megapixels=max_megapixels)
    except ImageUndecodable as problem:
        return {"integrity": str(problem)}
    return {**header_columns(header, len(data)), "integrity": "ok"}
