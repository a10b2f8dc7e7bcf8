"""Original bytes by content address: `<folder>/abc/<sha256>.<ext>`, never re-encoded.

Three hexadecimal digits make 4,096 folders: 10,000 files per folder at 40 million images. No part
of a path comes from a source, so nothing in an archive or a URL can lead outside.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from components.files.whole_files import flush

_PARTIAL = ".partial"
_HELD_BYTES = 65536
# From so many files on one flush of the whole file system is quicker than one for each.
_FEW_FILES = 4


def original_path(folder: Path, sha256: str, extension: str) -> Path:
    """Where an original lives."""
    return folder / sha256[:3] / f"{sha256}{extension}"


class OriginalWriter:
    """Bytes on their way into the store; hashed while they are written, 64 KiB held in memory.

    Leaving the `with` block without `seal` removes what was written.

    Args:
        folder: the store.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # In the store itself: `replace` is atomic only within a file system.
        self.path = folder / _PARTIAL / secrets.token_hex(16)
        """Where the bytes are until they are kept."""
        self.target: Path | None = None
        """Where `keep_originals` moves them; None until sealed."""
        self._held = b""
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def __enter__(self) -> OriginalWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is None:
            return
        self._file.close()
        if self.target is None:
            self.path.unlink()

    def write(self, data: bytes) -> None:
        """Append."""
        self._digest.update(data)
        self.size_bytes += len(data)
        # Little is held until `keep_originals`, whose thread may wait for the file system.
        if self._file is None and self.size_bytes <= _HELD_BYTES:
            self._held += data
        else:
            self._opened().write(data)

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            try:
                self._file = self.path.open("wb")
            except FileNotFoundError:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("wb")
            self._file.write(self._held)
            self._held = b""
        return self._file

    def read(self) -> bytes:
        """All that was written so far."""
        if self._file is None:
            return self._held
        self._file.flush()
        return self.path.read_bytes()

    def close(self) -> None:
        """Have all that was written in the file at `path`."""
        self._opened().close()

    def seal(self, extension: str) -> str:
        """End it; `keep_originals` brings it into the store.

        Returns:
            sha256 of the bytes.
        """
        if self._file is not None:
            self._file.close()
        sha256 = self._digest.hexdigest()
        self.target = original_path(self._folder, sha256, extension)
        return sha256


def keep_originals(writers: Sequence[OriginalWriter]) -> None:
    """Bring sealed bytes to their content addresses, on disk even after a power cut.

    Args:
        writers: of one store.

    Raises:
        OSError: the disk does not take them.
    """
    for writer in writers:
        writer.close()
    # Before the rename: a name that is a hash must never stand for fewer bytes, also after a power
    # cut.
    if len(writers) > _FEW_FILES:
        _flush_file_system(writers)
    else:
        for writer in writers:
            flush(writer.path)
    for writer in writers:
        assert writer.target is not None
        try:
            writer.path.replace(writer.target)
        except FileNotFoundError:
            writer.target.parent.mkdir(exist_ok=True)
            writer.path.replace(writer.target)


def _flush_file_system(writers: Sequence[OriginalWriter]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "syncfs"):
        # Linux alone has it.
        for writer in writers:
            flush(writer.path)
        return
    descriptor = os.open(writers[0].path, os.O_RDONLY)
    try:
        if libc.syncfs(descriptor):
            problem = ctypes.get_errno()
            raise OSError(problem, os.strerror(problem), str(writers[0].path))
    finally:
        os.close(descriptor)


def prune_originals(folder: Path, keep: Collection[str]) -> int:
    """Remove files that no row names, and what interrupted runs left.

    Args:
        folder: the store; made when it does not exist.
        keep: file names ("<sha256>.<ext>").

    Returns:
        number of files removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    removed = 0
    for place in sorted(folder.iterdir()):
        if not place.is_dir():
            continue
        for file in list(place.iterdir()):
            # One run at a time holds the store, so what is partial belongs to a run that has ended.
            if place.name == _PARTIAL or file.name not in keep:
                file.unlink()
                removed += 1
        if not any(place.iterdir()):
            place.rmdir()
    return removed
