"""Writes checkpoints beside training: one thread, at most one checkpoint in flight."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from components.training.distributed.checkpoint_folders import CheckpointAway, CheckpointUnreadable
from components.training.distributed.checkpoints import (
    CheckpointFailed,
    CheckpointStore,
    DiskFull,
    OpenCheckpoint,
    no_room,
)


class CheckpointWriter:
    """Fills and commits opened checkpoints of one `CheckpointStore`.

    Nothing here is collective: ranks meet in the store's `begin` only, and rank 0 commits when it
    sees the files of all ranks. An error of the thread is raised by the next `check`, `submit` or
    `wait` of the rank that had it.
    """

    def __init__(self, store: CheckpointStore, *, in_background: bool) -> None:
        """Write in a thread, or (`in_background` False) right in `submit`."""
        self._store = store
        self._in_background = in_background
        self._thread: threading.Thread | None = None
        self._problem: CheckpointFailed | None = None
        self._abandoned = threading.Event()

    def submit(self, opened: OpenCheckpoint, writes: Iterable[Callable[[], object]]) -> None:
        """Start to write; the one before must be through (`wait`).

        Args:
            opened: what `CheckpointStore.begin` returned.
            writes: fill the folder, called one after the other. They must not read anything that
                training changes.

        Raises:
            CheckpointFailed: only where writing is not in the background.
        """
        self.wait()
        # Copies may share their buffers with the next checkpoint, hence one in flight (`wait`
        # above).
        # A list now: an iterator would be asked by the thread, when training has already gone on.
        todo = list(writes)
        if not self._in_background:
            # The same path as in the thread, so that both ways fail alike.
            self._write(opened, todo)
            self.check()
            return
        # A daemon: a process that ends without `close` must not hang on a rank that is gone.
        self._thread = threading.Thread(
            target=self._write, args=(opened, todo), daemon=True, name="checkpoint-writer"
        )
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong since the last call, without waiting.

        Raises:
            CheckpointFailed: a checkpoint could not be written; says why.
        """
        # Taken out, so that it is raised once: cleaning up after it must not raise it again.
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def wait(self) -> None:
        """Return when nothing is in flight.

        Raises:
            CheckpointFailed: as `check`.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """End the thread; a checkpoint whose other ranks are gone is given up."""
        # Rank 0 may be waiting for the marks of ranks that are dead.
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, opened: OpenCheckpoint, writes: list[Callable[[], object]]) -> None:
        try:
            for write in writes:
                write()
            # Last: this rank's mark promises that all of its files are written.
            self._store.finish(opened, self._abandoned.is_set)
        except Exception as problem:
            # Kept for the training thread; an exception of this one would only be printed.
            reason = _reason(problem)
            try:
                self._store.fail(opened, reason)
            except OSError as second:
                # On a full disk the mark cannot be written either; this rank's exit says it.
                reason = f"{reason}; {_reason(second)}"
            # What a reader of the message asks first is how much is lost.
            try:
                newest = self._store.latest()
                kept = (
                    f"the checkpoint of step {newest[0]} is whole"
                    if newest
                    else "there is none yet"
                )
            except (CheckpointAway, CheckpointUnreadable):
                # What failed the writing, such as a lost disk, fails the look as well.
                kept = "the ones before it cannot be read just now"
            what_to_do = "make room and run again" if no_room(reason) else "run again to go on"
            kind = DiskFull if no_room(reason) else CheckpointFailed
            self._problem = kind(
                f"{self._store.folder}: the checkpoint of step {opened.step} could not be written "
                f"({reason}); {kept}, {what_to_do}"
            )
            # By hand, because this one is raised later and in another thread, where `from` has no
            # place.
            self._problem.__cause__ = problem


def _reason(problem: BaseException) -> str:
    """The system's own words where a library wrapped them into something vaguer."""
    # `no_room` knows a full disk by the system's words, so they must not stay under a wrapper.
    current: BaseException | None = problem
    while current is not None:
        if isinstance(current, OSError) and current.strerror:
            return current.strerror
        current = current.__cause__ or current.__context__
    return str(problem) or type(problem).__name__
