"""One pipeline, or one stage sent from elsewhere, at a time in a clone.

The lock is the kernel's (flock), so it ends with whoever holds it, however that ends. Guarded stage
processes hold it too: after `kill -9` of a pipeline the next one starts when the last training
process is gone, not before.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from components.files.holder_locks import lock_when_free, try_lock

LOCK_FILE = "runs/clone.lock"
STAGE_LOCKS = "runs/stage-locks"


class CloneBusy(RuntimeError):
    """Another run had the clone for longer than this one may wait; one line."""


@contextmanager
def clone_lock(
    root: Path, say: Callable[[str], None], *, patience_s: float | None = None
) -> Iterator[int]:
    """Hold the clone at `root`; wait where another process has it.

    Args:
        root: repository root.
        say: told one line before a wait.
        patience_s: how long to wait; None: until the other process ends.

    Yields:
        The file descriptor that is the lock, for processes that are to hold it too.

    Raises:
        CloneBusy: patience came to an end.
    """
    with _held(root / LOCK_FILE, root, say, patience_s) as descriptor:
        yield descriptor


def tree_lock_file(tree: Path) -> Path:
    """Beside a working tree: Git makes one in an empty folder only."""
    return tree.with_name(f".{tree.name}.lock")


@contextmanager
def tree_lock(tree: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep a working tree from being cleaned away, also while no run holds it as a clone.

    Args:
        tree: its folder, which need not be there yet.
        say: told one line before a wait.
    """
    with _held(tree_lock_file(tree), tree, say, None):
        yield


@contextmanager
def _held(
    path: Path, root: Path, say: Callable[[str], None], patience_s: float | None
) -> Iterator[int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not try_lock(descriptor):
            holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
            named = f" (process {holder})" if holder else ""
            busy = f"Another run{named} works in {root}"
            if patience_s is None:
                say(f"{busy}: waiting until it ends; Ctrl-C to leave")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            else:
                say(f"{busy}: waiting for {patience_s:.0f} s")
                deadline = time.monotonic() + patience_s
                if not lock_when_free(descriptor, lambda: time.monotonic() >= deadline):
                    raise CloneBusy(busy)
        # For people: the kernel's lock counts, not the number in the file.
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def stage_lock(root: Path, stage: str, stopping: Callable[[], bool]) -> Iterator[int]:
    """Hold one stage of the clone at `root`, to hand the lock on to the processes that run it.

    A run that was given up while it worked on (its machine was out of the server's reach) goes on
    to its end; the run that took its place waits here, and then finds the stage done.

    Args:
        root: repository root.
        stage: name in dvc.yaml.
        stopping: ends the wait.

    Yields:
        The file descriptor that is the lock.
    """
    path = root / STAGE_LOCKS / stage
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        lock_when_free(descriptor, stopping)
        yield descriptor
    finally:
        os.close(descriptor)
