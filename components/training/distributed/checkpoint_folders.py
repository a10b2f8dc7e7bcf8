"""What lies in a folder of checkpoints: which are whole, which are damaged, which is the newest.

It reads alone: for the store that writes them (`checkpoints`), and for commands that list them. A
folder gets a checkpoint's name when it is whole, so one of that name that is not whole was damaged
since. It is never taken for "there is none": a run would silently begin again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.settings.bad_input import BadInput

CONTENTS_FILE = "contents.json"
"""Written last inside a checkpoint: format version, step, size and hash of every file, and whether
the run was healthy when it was made."""
LATEST_FILE = "latest"
FORMAT = 1
WRITING = ".writing-"
"""Before the name of a checkpoint that is not whole yet; what a kill leaves of it is never loaded.
"""
REJECTED = ".rejected"
"""Inside a checkpoint that no run may go on from: it is damaged, or the run diverged after it."""
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_ABSENT = (FileNotFoundError, NotADirectoryError)


class CheckpointUnreadable(BadInput):
    """A checkpoint that does not hold what was written, or that may not be read."""


class CheckpointAway(RuntimeError):
    """A checkpoint that cannot be reached just now, on a disk or a mount: it may be back soon."""


@contextmanager
def within_reach(path: Path) -> Iterator[None]:
    """Any error of the system inside the block is a line about what could not be read.

    It says nothing about what is stored there.

    Raises:
        CheckpointUnreadable: a permission is missing.
        CheckpointAway: a disk or a mount is.
    """
    try:
        yield
    except OSError as problem:
        is_lasting = isinstance(problem, PermissionError)
        raise (CheckpointUnreadable if is_lasting else CheckpointAway)(
            f"{problem.filename or path}: cannot be read ({problem.strerror or problem}), so "
            "whether a whole checkpoint is there is not known; nothing was changed: see to the "
            "disk or the permission, and run again"
        ) from problem


def checkpoint_folders(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of all that has a checkpoint's name, oldest first.

    Raises:
        CheckpointUnreadable, CheckpointAway: the folder is there and cannot be listed.
    """
    with within_reach(folder):
        try:
            names = os.listdir(folder)
        except _ABSENT:
            return []
    found = [folder / name for name in names if _NAME.fullmatch(name)]
    return [(age(path.name)[0], path) for path in sorted(found, key=lambda path: age(path.name))]


def age(name: str) -> tuple[int, int]:
    """Orders checkpoints as they were made: by step, then by how often that step was saved.

    (-1, 0) for a name that is none of a checkpoint.
    """
    named = _NAME.fullmatch(name)
    return (int(named[1]), int(named[2] or 0)) if named else (-1, 0)


def damaged_file(checkpoint: Path) -> Path | None:
    """A file of a checkpoint that is missing, cut short or no list of the others; None: whole.

    By sizes, since listing is cheap and what a crash leaves is files cut short; who resumes
    compares hashes too (`CheckpointStore.latest_intact`).

    Raises:
        CheckpointUnreadable, CheckpointAway: it cannot be told.
    """
    contents = checkpoint / CONTENTS_FILE
    file = contents
    with within_reach(checkpoint):
        try:
            listed = json.loads(contents.read_text(encoding="utf-8"))
            if listed["format"] != FORMAT or listed["step"] != age(checkpoint.name)[0]:
                return contents
            for name, size in listed["files"].items():
                file = checkpoint / name
                if file.stat().st_size != size:
                    return file
        except (*_ABSENT, ValueError, KeyError, TypeError, AttributeError):
            return file
    return None


def is_rejected(checkpoint: Path) -> bool:
    """Whether no run may go on from it."""
    with within_reach(checkpoint):
        return (checkpoint / REJECTED).exists()


def is_healthy(checkpoint: Path) -> bool:
    """Whether it was made while loss and gradient were ordinary, and is not rejected."""
    if is_rejected(checkpoint):
        return False
    contents = json.loads((checkpoint / CONTENTS_FILE).read_text(encoding="utf-8"))
    return bool(contents.get("healthy", True))


def whole_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of those whose files all have their recorded sizes, oldest first."""
    return [item for item in checkpoint_folders(folder) if damaged_file(item[1]) is None]


def newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """(step, path) of the newest whole checkpoint in a folder of them, None when there is none.

    The file `latest` decides; where it is missing, or points at something damaged or rejected, the
    whole checkpoint with the highest step is taken.

    Raises:
        CheckpointUnreadable, CheckpointAway: it cannot be told.
    """
    # The pointer may be one checkpoint behind, after a kill between rename and pointer. What it
    # names is whole, so that costs some steps and never correctness.
    pointer = folder / LATEST_FILE
    with within_reach(pointer):
        try:
            named = pointer.read_text(encoding="utf-8").strip()
        except (*_ABSENT, ValueError):
            # There is none, or it is damaged: what it would name is found without it.
            named = ""
    listed = checkpoint_folders(folder)
    # Stable: the one that is named comes last, the others keep their order.
    found = sorted(listed, key=lambda item: item[1].name == named)
    for step, path in reversed(found):
        if not is_rejected(path) and damaged_file(path) is None:
            return step, path
    # A run at work may have put a newer one in the place of what was listed.
    return None if checkpoint_folders(folder) == listed else newest_checkpoint(folder)


def damaged_after(folder: Path, newest: Path | None) -> dict[Path, Path]:
    """The damaged file of every checkpoint newer than `newest` that is not whole, newest first.

    Args:
        folder: of the checkpoints.
        newest: one of them; None: all are asked for.
    """
    found = {}
    for _, path in reversed(checkpoint_folders(folder)):
        if newest is not None and age(path.name) <= age(newest.name):
            break
        file = None if is_rejected(path) else damaged_file(path)
        if file is not None:
            found[path] = file
    return found
