"""What ends a command in one line: refusals of others, of the disk, and of paths that were typed.

Everything else is a fault of this program and keeps its trace.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from components.files.cut_bytecode import describe_cut_bytecode, remove_cut_bytecode
from components.files.safetensors_header import system_error
from components.files.whole_files import NotRegularFile

FAILED, BAD_INPUT = 1, 2
"""Exit codes."""
_OWN_WORDS = (
    ("flows.environment", "ProjectNameRefused", BAD_INPUT),
    ("flows.versioning.graph", "GraphError", FAILED),
    ("flows.records.records", "TornJson", FAILED),
    ("flows.tracking.store_problems", "DamagedStore", FAILED),
    ("flows.tracking.store_problems", "TrackingAway", FAILED),
    ("components.training.distributed.checkpoint_folders", "CheckpointAway", FAILED),
    ("components.training.distributed.checkpoint_folders", "CheckpointUnreadable", BAD_INPUT),
    ("components.settings.yaml_files", "YamlRefused", BAD_INPUT),
    ("components.settings.schema", "SettingsError", BAD_INPUT),
)
"""Exceptions of ours that are a line, by a module that is imported where one is raised; codes."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ROOM_SAID = "disk I/O error|database or disk is full"
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_SUCH_PLACE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


def refusal(problem: Exception, words: Sequence[str]) -> tuple[str, int] | None:
    """One line and the exit code; None: a fault of this program.

    Args:
        problem: what ended the command.
        words: of the command line, without the program.
    """
    if (cut := remove_cut_bytecode(problem)) is not None:
        return describe_cut_bytecode(cut), FAILED
    text = " ".join(str(problem).split())
    for module, name, code in _OWN_WORDS:
        if isinstance(problem, getattr(sys.modules.get(module), name, ())):
            return text, code
    errors = sys.modules.get("dvc.exceptions")
    if errors is not None and isinstance(problem, errors.DvcException):
        return f"DVC: {text}", FAILED
    said_by_system = system_error(problem)
    full = said_by_system is not None and said_by_system.errno in _NO_ROOM
    # SQLite says no more than this, of DVC's own databases as of ours.
    if full or (type(problem).__name__ == "OperationalError" and re.search(_NO_ROOM_SAID, text)):
        line = f"a file cannot be written ({text}): make room on the disk, then run it again"
        return line, FAILED
    if isinstance(problem, NotRegularFile):
        return f"{problem.filename}: {problem.strerror}", BAD_INPUT
    said = _of_a_path(problem, words) if isinstance(problem, OSError) else None
    return None if said is None else (said, BAD_INPUT)


def _of_a_path(problem: OSError, words: Sequence[str]) -> str | None:
    """What the system says of a path: forbidden ones, or what the command line names."""
    names = [os.fsdecode(name) for name in (problem.filename, problem.filename2) if _is_path(name)]
    if not names or problem.errno not in _NOT_ALLOWED | _NO_SUCH_PLACE:
        return None
    here = Path.cwd()
    for typed in _typed_paths(words, here):
        if any(_belongs(typed, name, here) for name in names):
            at = "" if os.path.abspath(typed) == os.path.abspath(names[0]) else f" ({names[0]})"
            return f"{typed}: {_said(problem, names[0])}{at}"
    return f"{names[0]}: {problem.strerror}" if problem.errno in _NOT_ALLOWED else None


def _said(problem: OSError, name: str) -> str:
    """Of a link that leads nowhere, or in a loop, where a folder is to be: "File exists"."""
    leads_nowhere = problem.errno == errno.EEXIST and not os.path.exists(name)
    return "a link that leads nowhere" if leads_nowhere else str(problem.strerror)


def _is_path(name: object) -> bool:
    return isinstance(name, str | bytes) and bool(name)


def _typed_paths(words: Sequence[str], here: Path) -> Iterator[str]:
    """Words, and values of --option=value, that can name a file or a folder."""
    for word in words:
        value = word.partition("=")[2] if word.startswith("-") else word
        # The folder one stands in, or one above it, would own every file of the project.
        if value and not here.is_relative_to(os.path.abspath(value)):
            yield value


def _belongs(typed: str, name: str, here: Path) -> bool:
    """Whether `name` is that path, a folder on its way, inside it, or its temporary."""
    path, found = Path(os.path.abspath(typed)), Path(os.path.abspath(name))
    # What holds the folder one stands in is on the way to every word.
    is_on_its_way = path.is_relative_to(found) and not here.is_relative_to(found)
    is_temporary = found.parent == path.parent and found.name.startswith(f".{path.name}.")
    return is_on_its_way or found.is_relative_to(path) or is_temporary
