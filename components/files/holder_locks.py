"""A lock file that names its holder: the kernel's lock counts, the name is for people."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held_alone(
    path: Path, name: str, refusal: Callable[[str], Exception], *, mode: int = 0o644
) -> Iterator[None]:
    """Hold the lock of a file until the block, or the process, ends.

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
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
            raise refusal(holder or "unknown") from None
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{name}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
