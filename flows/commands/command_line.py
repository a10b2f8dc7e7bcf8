"""What every command shares: finding the project, and one clear line per problem."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from components.telemetry.wording import legible
from flows import environment

Json = Annotated[bool, typer.Option("--json", help="One JSON object.")]

_SYSTEM_ERROR = re.compile(r"\[Errno -?\d+\] ([^:]+): '(.+?)'( -> '.+?')?")
"""How Python words what the system says of a path."""


def fail(message: str, code: int = 2) -> typer.Exit:
    """Print each line of `message` as an error; raise what is returned to end with `code`.

    Of an error with a path, the path is said first and the system's number not at all.
    """
    for line in _SYSTEM_ERROR.sub(r"\2: \1", message).splitlines():
        print(f"error: {legible(line)}", file=sys.stderr)
    return typer.Exit(code)


@contextlib.contextmanager
def refusing(*problems: type[Exception], code: int = 2) -> Iterator[None]:
    """End the command with `code` and what such a problem says.

    Raises:
        typer.Exit: its lines were printed.
    """
    try:
        yield
    except problems as problem:
        raise fail(str(problem), code) from None


def print_json(value: object, default: Callable[[Any], Any] | None = None) -> None:
    """Print one JSON value; `default` says what stands for what JSON does not know."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=default)
    try:
        print(text)
    except UnicodeEncodeError:
        # A terminal of few characters, or a name of a file that is no text.
        print(json.dumps(value, indent=1, default=default))


def why_no_file(path: Path) -> str:
    """Why a path that is no regular file cannot be read: the end of "PATH: ..."."""
    if path.is_dir():
        return "a folder, not a file"
    if path.exists():
        # Reading a pipe would wait for ever.
        return "not a regular file"
    return "a link that leads nowhere" if path.is_symlink() else "no such file"


def refuse_unknown_stage(root: Path, name: str | None) -> None:
    """Refuse a name that dvc.yaml does not hold, before anything heavy is imported.

    Raises:
        typer.Exit: one line was printed.
    """
    from flows.versioning.graph import read_stages

    if name is not None and name not in (known := read_stages(root)):
        raise fail(f"no stage '{name}' in dvc.yaml; stages: {', '.join(known)}")


@contextlib.contextmanager
def silenced(is_quiet: bool) -> Iterator[None]:
    """Throw away what is printed meanwhile; errors are not."""
    if not is_quiet:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def stages(incomplete: str) -> list[str]:
    """Stages of this clone that begin so, for the shell's completion."""
    from flows.versioning.graph import read_stages

    with contextlib.suppress(Exception):
        return [
            one for one in read_stages(environment.project_root()) if one.startswith(incomplete)
        ]
    return []


def profiles(incomplete: str) -> list[str]:
    """Profiles of this clone that begin so, for the shell's completion."""
    with contextlib.suppress(FileNotFoundError):
        folder = environment.project_root() / "conf" / "profiles"
        return sorted(path.stem for path in folder.glob(f"{incomplete}*.yaml"))
    return []


def refuse_no_store(folder: Path, otherwise: str) -> None:
    """Refuse a folder that is no finished store, before torch is imported.

    Raises:
        typer.Exit: one line was printed.
    """
    if not (folder / "index.parquet").is_file():
        raise fail(f"{folder}: no index.parquet; {otherwise}")


def workplace() -> Path:
    """The project around the current folder; outside of any, the current folder itself.

    For commands that need no pipeline: settings are then those of `profiles.settings_of`.
    """
    environment.prepare()
    try:
        return environment.project_root()
    except FileNotFoundError:
        return Path.cwd()


def project_root(files: Sequence[str] = environment.PROJECT_FILES) -> Path:
    """The project around the current folder, known by `files`, with third-party switches set.

    Raises:
        typer.Exit: there is none; one line was printed.
    """
    with refusing(FileNotFoundError):
        root = environment.project_root(files=files)
    environment.prepare()
    return root
