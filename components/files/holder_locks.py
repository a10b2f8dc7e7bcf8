"""Locks of files: the kernel's, so each ends with the process that holds it, however that ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_CLAIMED: list[IO[str]] = []
"""Open files keep their locks."""


def try_lock(file: int | IO[Any]) -> bool:
    """Take the lock of an open file, to hold as long as it is open; False: another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_when_free(
    file: int | IO[Any], give_up: Callable[[], bool], *, poll_s: float = 0.2
) -> bool:
    """`try_lock` until it is taken or `give_up` says so: a blocking call would not ask.

    Returns:
        Whether it was taken.
    """
    while not give_up():
        if try_lock(file):
            return True
        time.sleep(poll_s)
    return False


def claim_first(files: Iterable[Path]) -> Path | None:
    """The first of these that no living process has claimed, kept until this process ends."""
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Never removed: deleting a locked file would let two processes lock two files of one name.
        file = path.open("w")
        if try_lock(file):
            _CLAIMED.append(file)
            return path
        file.close()
    return None


@contextmanager
def folder_alone(folder: Path, refusal: str) -> Iterator[None]:
    """Hold a folder itself: a lock file would be one more file in what DVC tracks.

    Raises:
        ValueError: another process holds it; with `refusal`.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            raise ValueError(f"{folder}: {refusal}")
        yield
    finally:
        os.close(descriptor)


@contextmanager
def held_alone(
    path: Path, name: str, refusal: Callable[[str], Exception], *, mode: int = 0o644
) -> Iterator[None]:
    """Hold the lock of a file that names its holder, for people, until the block ends.

    The file stays: whoever removed it would remove the lock of a process that has just begun.

    Args:
        path: of the file; its folder exists.
        name: of this process, for whoever is refused.
        refusal: error to raise where another process has it; gets the name of that one, "unknown"
            where it has not written it yet.
        mode: of a file that is made, before the umask.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, mode)
    try:
        if not try_lock(descriptor):
            holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
            raise refusal(holder or "unknown")
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{name}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
