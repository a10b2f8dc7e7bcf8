"""Hashes of a checkpoint's files: made when it is written, compared once when a run resumes.

A disk or a copy that changes a bit leaves sizes as they are, and a training state with another bit
is a state like any other: nothing would ever show it.
"""

from __future__ import annotations

import errno
import json
import os
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

_BLOCK = 1 << 24
# Reading and hashing leave Python's lock alone, and one thread copies less than a disk gives.
_THREADS = 4


def file_hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """xxh64 of files below `folder` by name, as the record stores have it."""
    listed = list(names)
    with ThreadPoolExecutor(_THREADS, "checkpoint-hash") as pool:
        hashes = pool.map(file_hash, (folder / name for name in listed))
        return dict(zip(listed, hashes, strict=True))


def file_hash(path: Path) -> str:
    """xxh64 of a file's bytes, in hexadecimal."""
    digest = xxhash.xxh64()
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def blames_file(problem: Exception) -> bool:
    """Whether an error while a file is read speaks of what the file holds.

    A lack of memory, a refused permission or a mount that went away says nothing about it: who took
    that for damage would throw a good checkpoint away.
    """
    if isinstance(problem, OSError):
        # No file, a sector that cannot be read, or a place that the file does not have.
        return problem.errno in (None, errno.ENOENT, errno.EIO, errno.EINVAL)
    # torch's own has the same name and is no MemoryError; its allocators on the CPU say it in the
    # system's words.
    lacks_memory = isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError"
    return not lacks_memory and os.strerror(errno.ENOMEM) not in str(problem)


def first_damaged(folder: Path, hashes: dict[str, str | None]) -> Path | None:
    """The first file below `folder` that is not what was written; None: all are.

    Args:
        folder: of the checkpoint.
        hashes: by name; None: an older checkpoint has none, and the file has to speak for itself.
    """
    with ThreadPoolExecutor(_THREADS, "checkpoint-hash") as pool:
        found = pool.map(lambda item: _is_intact(folder / item[0], item[1]), hashes.items())
        return next((folder / name for name, ok in zip(hashes, found, strict=True) if not ok), None)


def _is_intact(path: Path, expected: str | None) -> bool:
    try:
        if expected is not None:
            return file_hash(path) == expected
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        if path.suffix == ".pt":
            # What torch writes is a zip archive with a checksum of each tensor.
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
    except Exception as problem:
        # Whatever a damaged file makes its reader say.
        if not blames_file(problem):
            raise
        return False
    return True
