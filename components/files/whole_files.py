"""Files and folders that are there whole or not at all: written under another name and renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path


@contextmanager
def whole_file(
    path: Path, *, durable: bool = False, contended: bool = False, follow: bool = False
) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` when the block ends.

    An error in the block leaves `path` as it was and nothing else behind. What a kill leaves has a
    name that the next writer takes, so that no folder of results keeps it.

    Args:
        path: the file to make or to replace; its folder exists.
        durable: bytes and name are on the disk at the end, also after a power cut.
        contended: several processes may replace the file at once: the name is this process's own,
            and what a kill leaves stays.
        follow: a link stays, and what it leads to is replaced: for a place that a person names.
            Otherwise the link gives way, for in a clone it may lead into DVC's cache.

    Raises:
        NotRegularFile: a pipe, a socket or a device has that name; a file is never put in its
            place.
    """
    _refuse_odd(path)
    if follow:
        path = path.resolve()
    owner = os.getpid() if contended else "partial"
    temporary = path.with_name(f".{path.name}.{owner}")
    try:
        yield temporary
        if durable:
            flush(temporary)
        temporary.replace(path)
    except BaseException:
        # What went wrong is the block's error, never that its remains could not be removed.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        flush(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to fill; it replaces `path` when the block ends.

    An error in the block leaves `path` as it was and nothing else behind: on a full disk half a
    model would take the room that is missing. For folders that one process writes; what a kill
    leaves, the next call removes.
    """
    temporary = path.with_name(f".{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def _refuse_odd(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError:
        # There is none, or writing says what is wrong.
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise NotRegularFile(errno.EINVAL, "not a regular file", str(path))


def write_bytes(
    path: Path,
    content: bytes | memoryview,
    *,
    durable: bool = False,
    contended: bool = False,
    follow: bool = False,
) -> None:
    """Make or replace `path`; a reader (or a kill) never meets a half-written file."""
    with whole_file(path, durable=durable, contended=contended, follow=follow) as temporary:
        temporary.write_bytes(content)


def write_text(
    path: Path, text: str, *, durable: bool = False, contended: bool = False, follow: bool = False
) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode(), durable=durable, contended=contended, follow=follow)


class NotRegularFile(OSError):
    """A pipe, a socket or a device."""


@contextmanager
def open_regular(path: Path | str) -> Iterator[FileIO]:
    """A regular file for reading; a pipe or a device would keep its reader for ever.

    Raises:
        NotRegularFile: a pipe, a socket or a device.
        OSError: it cannot be opened; `strerror` says why.
    """
    # Not blocking, and the status of what was opened: a name may change its meaning in between.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise NotRegularFile(errno.EINVAL, "not a regular file", str(path))
        yield file


def regular_bytes(path: Path) -> bytes:
    """All bytes of a file that `open_regular` opens.

    Raises:
        OSError: see there, or they cannot be read.
    """
    with open_regular(path) as file:
        return file.readall()


def flush(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before anything else happens."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
