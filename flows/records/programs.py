"""Git and DVC as programs: what they print, or one line of why not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from components.telemetry.last_words import last_words


class ProgramFailed(RuntimeError):
    """A program ended with an error; one line that names the command."""


def _run(
    command: Sequence[str], root: Path, name: str, failure: type[Exception], data: bytes | None
) -> str:
    done = subprocess.run(command, cwd=root, capture_output=True, input=data)
    if done.returncode:
        said = last_words(done.stderr.decode(errors="backslashreplace"), "fatal:", "ERROR:")
        raise failure(f"{name}: {said.removeprefix('ERROR: ')}")
    # Leading spaces belong to the columns of `git status --porcelain`; a file's name may be any
    # bytes.
    return os.fsdecode(done.stdout).rstrip()


def git(
    root: Path,
    *arguments: str,
    data: bytes | None = None,
    failure: type[Exception] = ProgramFailed,
) -> str:
    """What a Git command prints, with names as Python has them (`os.fsdecode`).

    Args:
        root: the folder to run it in.
        arguments: the command's words.
        data: its standard input.
        failure: what to raise, with one line, where Git ends with an error.

    Raises:
        ProgramFailed: it did, or `failure` in its place.
    """
    # Quoted whatever the user's settings: a listing for people can be printed and stored. `-z`
    # gives the names themselves.
    command = ["git", "-c", "core.quotePath=true", *arguments]
    return _run(command, root, f"git {arguments[0]}", failure, data)


def git_answer(root: Path, *arguments: str) -> str | None:
    """As `git`; None where the command fails, such as where there is no repository."""
    try:
        return git(root, *arguments)
    except ProgramFailed:
        return None


def dvc(root: Path, *arguments: str, failure: type[Exception] = ProgramFailed) -> None:
    """Run a DVC command, which is quiet and waits for another one's lock.

    Raises:
        ProgramFailed: it ended with an error, or `failure` in its place; one line.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments, "-q"]
    _run(command, root, f"dvc {' '.join(arguments)}", failure, None)
