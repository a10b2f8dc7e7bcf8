"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `step-00000040/` filled by the caller. It is written aside, flushed to
disk, renamed, and only then does the small file `latest` point at it. Because a rename is atomic,
a reader sees either a whole checkpoint or none; what a kill leaves behind is ignored on reading
and removed by the next `save`. One training run writes to a folder at a time.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.files.safetensors_header import system_error
from components.files.whole_files import flush, write_bytes, write_text
from components.training.distributed.checkpoint_folders import (
    CONTENTS_FILE,
    FORMAT,
    LATEST_FILE,
    REJECTED,
    WRITING,
    CheckpointUnreadable,
    age,
    checkpoint_folders,
    damaged_after,
    is_healthy,
    is_rejected,
    newest_checkpoint,
    whole_checkpoints,
    within_reach,
)
from components.training.distributed.checkpoint_hashes import (
    blames_file,
    file_hashes,
    first_damaged,
)

if TYPE_CHECKING:
    import torch

# Does not begin with `step-`: what a kill leaves under this name is never loaded.
_DROPPED = ".dropped-"
# One empty file per rank whose part is on disk; a text where the rank failed. Not in the contents.
_DONE = ".done-"
_FAILED = ".failed-"
_POLL_S = 0.01


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written; the ones before it are untouched."""


class DiskFull(CheckpointFailed):
    """No room for a checkpoint (disk, quota or file size limit); a retry would end alike."""


_NO_ROOM = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def no_room(reason: str) -> bool:
    """Whether the system's words, on this rank or passed on by another, say that a disk is full."""
    return any(words in reason for words in _NO_ROOM)


@contextmanager
def full_disks_named(folder: Path) -> Iterator[None]:
    """An error for want of room becomes `DiskFull`, which no restart repeats.

    Args:
        folder: named where the system names no file.
    """
    try:
        yield
    except Exception as problem:
        said = system_error(problem)
        if said is None or not no_room(said.strerror or ""):
            raise
        where = said.filename or folder
        raise DiskFull(f"{where}: {said.strerror}; make room and run again") from problem


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint that is being written."""

    step: int
    aside: Path
    """The folder to fill."""
    final: Path
    """Its name once it is whole."""
    healthy: bool = True
    """Whether loss and gradient were ordinary when it was made."""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush_tree(folder: Path) -> None:
    """Flush every file and every folder below and including `folder`.

    The marks of other ranks are left out: they may be renamed meanwhile.
    """
    for path in _files(folder):
        if not path.name.lstrip(".").startswith((_DONE[1:], _FAILED[1:])):
            flush(path)
    # A file's name lies in its folder, which has to be flushed for itself.
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        flush(path)


class CheckpointStore:
    """Checkpoints of one run, in one folder.

    With several ranks every rank makes the same calls and passes the same `barrier`; each writes
    its own files into the shared folder (as DeepSpeed's `save_checkpoint` does) and rank 0 commits
    once it sees the mark of every rank. Only `begin` and `save` are collective, so `finish` may
    run in a thread beside training.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], object] = lambda: None,
        on_any_rank: Callable[[bool], bool] = lambda flag: flag,
        is_needed: Callable[[int, int], bool] = lambda step, newest: False,
    ) -> None:
        """Use `folder` (created when missing).

        Args:
            folder: where the checkpoints live.
            keep: how many of the newest complete checkpoints stay, at least 1.
            rank: this process; only rank 0 renames and deletes.
            world_size: number of ranks.
            barrier: returns when every rank has called it, such as `torch.distributed.barrier`.
            on_any_rank: whether a flag is set on any rank, when every rank has called it.
            is_needed: asked of (step, newest step) whether a checkpoint stays beside the newest.

        Raises:
            ValueError: `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least one checkpoint must stay")
        self.folder = folder
        self.keep = keep
        self._rank = rank
        self._world_size = world_size
        self._barrier = barrier
        self._on_any_rank = on_any_rank
        self._is_needed = is_needed
        # Present and whole when the run went on, or saved since.
        self._known: set[Path] = set()
        self._told: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, write: Callable[[Path], object]) -> Path:
        """Store a checkpoint; afterwards (and not before) `latest` returns it.

        Args:
            step: optimizer steps done, at least 0. Saving a step again replaces it.
            write: fills the empty folder that it is given; sub-folders are fine.

        Returns:
            The folder of the checkpoint.
        """
        opened = self.begin(step)
        write(opened.aside)
        self.finish(opened)
        self._barrier()
        return opened.final

    def begin(self, step: int, *, healthy: bool = True) -> OpenCheckpoint:
        """Open an empty folder for a checkpoint; the one before it must be finished.

        Args:
            step: optimizer steps done, at least 0.
            healthy: the checkpoint remembers it.
        """
        if step < 0:
            raise ValueError(f"step = {step}: must be at least 0")
        # One rank makes the folder, and nobody writes before the barrier says that it is there.
        aside = self.folder / f"{WRITING}{step:08d}"
        if self._rank == 0:
            self._remove_leftovers()
            # Fails where the folder is left over: files of two checkpoints must never mix.
            aside.mkdir()
        # When this returns, `latest` gives the same answer on every rank and not on rank 0 alone.
        self._barrier()
        final = self._unused_name(step)
        # Nobody may rename before everybody has computed the name.
        self._barrier()
        return OpenCheckpoint(step, aside, final, healthy)

    def finish(
        self, opened: OpenCheckpoint, is_abandoned: Callable[[], bool] = lambda: False
    ) -> None:
        """Flush what this rank has written; rank 0 waits for all ranks and commits.

        Args:
            opened: a checkpoint into which this rank has written all of its files.
            is_abandoned: asked while rank 0 waits; True makes it give up.

        Raises:
            CheckpointFailed: another rank failed, or the wait was abandoned.
        """
        # A rank on another node can flush only what it wrote itself, so every rank flushes.
        _flush_tree(opened.aside)
        if self._world_size > 1:
            # Empty, since its name says all; durable, since rank 0 commits on its word.
            write_bytes(
                opened.aside / f"{_DONE}{self._rank:05d}", b"", durable=True, contended=True
            )
        if self._rank == 0:
            self._wait_for_marks(opened, is_abandoned)
            self._commit(opened)

    def fail(self, opened: OpenCheckpoint, reason: str) -> None:
        """Tell rank 0 that this rank cannot write its part."""
        if self._world_size > 1:
            write_text(
                opened.aside / f"{_FAILED}{self._rank:05d}", reason, durable=True, contended=True
            )

    def _wait_for_marks(self, opened: OpenCheckpoint, is_abandoned: Callable[[], bool]) -> None:
        """Return when every rank is done, with the marks removed."""
        if self._world_size == 1:
            return
        # By files and not by a collective: this runs in a thread beside training, and collectives
        # that two threads issue meet in another order on every rank.
        marks = [opened.aside / f"{_DONE}{rank:05d}" for rank in range(self._world_size)]
        while not all(mark.exists() for mark in marks):
            # A rank that failed never marks itself done; without its word this would wait for ever.
            for failed in sorted(opened.aside.glob(f"{_FAILED}*")):
                rank, reason = int(failed.name.removeprefix(_FAILED)), failed.read_text()
                raise CheckpointFailed(f"rank {rank}: {reason}")
            if is_abandoned():
                missing = [rank for rank, mark in enumerate(marks) if not mark.exists()]
                raise CheckpointFailed(f"training ended before ranks {missing} had written")
            time.sleep(_POLL_S)
        # Before the contents are listed: marks are no part of a checkpoint.
        for mark in marks:
            mark.unlink()

    def latest(self) -> tuple[int, Path] | None:
        """(step, folder) of the newest whole checkpoint, None when there is none."""
        return newest_checkpoint(self.folder)

    def latest_intact(self) -> tuple[int, Path] | None:
        """As `latest`, of those whose files have the bytes that were written; collective.

        A damaged checkpoint is rejected with one line, where there is one before it.

        Raises:
            CheckpointUnreadable: it is damaged, and there is none before it; or it may not be read.
            CheckpointAway: it cannot be reached just now.
        """
        while True:
            newest = self.latest()
            before = None if newest is None else newest[0]
            # What is cut short is seen by every rank; the first one says it.
            cut = damaged_after(self.folder, None if newest is None else newest[1])
            if self._turned_down(cut if self._rank == 0 else {}, before):
                continue
            if newest is None:
                return None
            file = self._damaged(newest[1])
            others = [at for at, path in self._accepted() if path != newest[1]]
            damaged = {} if file is None else {newest[1]: file}
            if not self._turned_down(damaged, max(others, default=None)):
                self._known |= {path for _, path in whole_checkpoints(self.folder)}
                return newest

    def _turned_down(self, damaged: dict[Path, Path], before: int | None) -> bool:
        """Reject what any rank has found damaged, with one line each; collective.

        Args:
            damaged: the file at fault of each checkpoint that this rank has found.
            before: step of the checkpoint to go on from; None: there is none.

        Returns:
            Whether there was any.
        """
        # When it returns every rank has looked, and none has rejected anything yet.
        if not self._on_any_rank(bool(damaged)):
            return False
        files = [f"{file}: damaged, it does not hold what was written" for file in damaged.values()]
        if before is None:
            what = files[0] if files else f"{self.folder}: damaged"
            raise CheckpointUnreadable(
                f"{what}, and there is no checkpoint before it: bring the file back, or delete "
                f"{self.folder.parent} to begin again"
            )
        for line, checkpoint in zip(files, damaged, strict=True):
            write_bytes(checkpoint / REJECTED, b"", durable=True, contended=True)
            print(f"{line}; going on from step {before}", file=sys.stderr, flush=True)
        self._barrier()
        return True

    def _damaged(self, folder: Path) -> Path | None:
        """A file among this rank's share that does not hold what was written."""
        contents = json.loads((folder / CONTENTS_FILE).read_text(encoding="utf-8"))
        hashes = contents.get("xxh64", {})
        # All are read once, by all ranks together.
        share = sorted(contents["files"])[self._rank :: self._world_size]
        with within_reach(folder):
            return first_damaged(folder, {name: hashes.get(name) for name in share})

    def _accepted(self) -> list[tuple[int, Path]]:
        return [item for item in whole_checkpoints(self.folder) if not is_rejected(item[1])]

    def healthy_at(self, step: int) -> Path | None:
        """The newest whole, healthy and intact checkpoint after `step` steps; collective."""
        found = [
            path for at, path in whole_checkpoints(self.folder) if at == step and is_healthy(path)
        ]
        newest = max(found, key=lambda path: age(path.name), default=None)
        if newest is None or self._on_any_rank(self._damaged(newest) is not None):
            return None
        return newest

    def reject(self, is_wrong: Callable[[int, bool], bool]) -> list[int]:
        """Let `latest` never return some checkpoints again; on the first rank only.

        Args:
            is_wrong: asked of (step, healthy) of each.

        Returns:
            Steps of the rejected ones, ascending.
        """
        wrong = [
            (step, path)
            for step, path in whole_checkpoints(self.folder)
            if is_wrong(step, is_healthy(path))
        ]
        for _, path in wrong:
            write_bytes(path / REJECTED, b"", durable=True)
        return sorted(step for step, _ in wrong)

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, ascending."""
        return sorted({step for step, _ in whole_checkpoints(self.folder)})

    def _unused_name(self, step: int) -> Path:
        """`step-00000040`, or with a repeat number where that step was saved before."""
        # A name of its own, since a rename onto a folder with files fails, and removing the old one
        # first would leave a moment without either.
        name = f"step-{step:08d}"
        repeat = 0
        while (candidate := self.folder / (f"{name}.{repeat}" if repeat else name)).exists():
            repeat += 1
        return candidate

    def _commit(self, opened: OpenCheckpoint) -> None:
        step, aside, final = opened.step, opened.aside, opened.final
        # Every file is on the disk by now (`finish`). The order of what follows is the promise:
        # contents, then the name, then the pointer, each on the disk before the next begins. Any
        # prefix of it is a folder without a checkpoint's name, or a whole checkpoint.
        sizes = {path.relative_to(aside).as_posix(): path.stat().st_size for path in _files(aside)}
        contents = {
            "format": FORMAT,
            "step": step,
            "files": sizes,
            "xxh64": file_hashes(aside, sizes),
            "healthy": opened.healthy,
        }
        (aside / CONTENTS_FILE).write_text(json.dumps(contents, indent=1), encoding="utf-8")
        flush(aside / CONTENTS_FILE)
        flush(aside)
        os.rename(aside, final)
        flush(self.folder)
        write_text(self.folder / LATEST_FILE, f"{final.name}\n", durable=True, contended=True)
        self._known.add(final)
        # Only now: until the pointer has moved, the old checkpoint is the one to resume from.
        self._drop_old(step, final)

    def _drop_old(self, step: int, newest: Path) -> None:
        """Retention: the newest `keep`; steps beyond `step` that this run has gone back from go."""
        # Steps beyond this one were saved by a run that was later put back. If they stayed,
        # `latest` would choose them, as the highest, once its pointer is lost.
        dropped = {path for _, path in checkpoint_folders(self.folder) if is_rejected(path)}
        whole = [(at, path) for at, path in self._accepted() if path != newest]
        older = [item for item in whole if item[0] < step]
        # Never below zero: a negative start would count from the end, and drop what is to be kept.
        first_kept = max(0, len(older) - self.keep + 1)
        kept = {path for _, path in older[first_kept:]}
        kept |= {path for at, path in older if self._is_needed(at, step)}
        # One to go back to, however long the run has been unwell.
        well = [path for _, path in older if is_healthy(path)]
        if well and not is_healthy(newest):
            kept.add(well[-1])
        # Nobody went back from what was away when the run went on, as a disk may be.
        away = {path for at, path in whole if at > step and path not in self._known}
        for path in sorted(away - self._told):
            print(
                f"{path}: was not there when this run went on, and stays; to go on from it, end "
                f"the run and delete {self.folder / LATEST_FILE}",
                file=sys.stderr,
                flush=True,
            )
        self._told |= away
        dropped |= {path for _, path in whole} - kept - away
        for path in sorted(dropped):
            # Renamed first: a half-deleted folder must never look like a checkpoint.
            gone = self.folder / f"{_DROPPED}{path.name}"
            os.rename(path, gone)
            shutil.rmtree(gone)

    def _remove_leftovers(self) -> None:
        """What killed runs left: half-written and half-deleted folders, temporary files."""
        for path in self.folder.iterdir():
            if path.name.startswith((WRITING, _DROPPED)):
                shutil.rmtree(path)
            # A contended write uses a temporary name of its process, which no later one takes over.
            elif path.name.startswith(f".{LATEST_FILE}."):
                path.unlink()


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them; `load_state` reads it back."""
    # Here, because commands that only list checkpoints start without torch.
    import torch

    # Through a file of Python: given a path, torch says of a full disk "unexpected pos" alone.
    with path.open("wb") as file:
        torch.save(state, file)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What is wrong with a file of a checkpoint that is read inside the block is said of it.

    Raises:
        CheckpointUnreadable: instead of any error that speaks of the file (`blames_file`).
    """
    try:
        yield
    except Exception as problem:
        if not blames_file(problem):
            raise
        raise CheckpointUnreadable(
            f"{path}: not a readable part of a checkpoint ({type(problem).__name__}); delete the "
            "checkpoint that holds it to go on from an earlier one"
        ) from problem


def load_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save_state` wrote, without running any code from the file.

    Raises:
        CheckpointUnreadable: not such a file (or it holds more than tensors and plain values).
    """
    import torch

    with reading(path):
        # `weights_only`: a pickle runs whatever its author wrote, and checkpoints travel.
        state = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(state, dict):
        raise CheckpointUnreadable(f"{path}: expected a mapping, found {type(state).__name__}")
    return state
