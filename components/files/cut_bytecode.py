"""Compiled modules that a full disk has cut off.

Python does not look whether all of a module's bytecode was written, so that a disk that fills up
leaves a `.pyc` that no later process can import: every command would end in an EOFError until
somebody finds the file.
"""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path

# What unmarshalling a part of a file ends in.
_READING_A_PART = (EOFError, ValueError, TypeError)
_READER = "_compile_bytecode"


def remove_cut_bytecode(problem: BaseException) -> Path | None:
    """The compiled module that could not be read, removed; None: the problem is another one."""
    if not isinstance(problem, _READING_A_PART):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(problem.__traceback__)]
    last = frames[-1] if frames else None
    if last is None or last.f_code.co_name != _READER:
        return None
    path = last.f_locals.get("bytecode_path")
    if not isinstance(path, str) or not path.endswith(".pyc"):
        return None
    # Python writes it again at the next import. Where it may not be removed, its name helps.
    with contextlib.suppress(OSError):
        Path(path).unlink()
    return Path(path)


def describe_cut_bytecode(path: Path) -> str:
    """One line for whoever asked."""
    left = "remove it and run this again" if path.exists() else "it is removed: run this again"
    return f"{path} was cut off, as by a full disk; {left}"
