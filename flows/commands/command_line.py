"""What every command shares: finding the project, and one clear line per problem."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from flows import environment


def fail(message: str, code: int = 2) -> typer.Exit:
    """Print each line of `message` as an error; raise what is returned to end with `code`."""
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return typer.Exit(code)


def refuse_unknown_stage(root: Path, name: str | None) -> None:
    """Refuse a name that dvc.yaml does not hold, before anything heavy is imported.

    Raises:
        typer.Exit: one line was printed.
    """
    from flows.versioning.graph import read_stages

    if name is not None and name not in (known := read_stages(root)):
        raise fail(f"no stage '{name}' in dvc.yaml; stages: {', '.join(known)}")


def refuse_no_store(folder: Path, otherwise: str) -> None:
    """Refuse a folder that is no finished store, before torch is imported.

    Raises:
        typer.Exit: one line was printed.
    """
    if not (folder / "index.parquet").is_file():
        raise fail(f"{folder}: no index.parquet; {otherwise}")


def project_root() -> Path:
    """The project around the current folder, with third-party switches set.

    Raises:
        typer.Exit: there is none; one line was printed.
    """
    try:
        root = environment.project_root()
    except FileNotFoundError as problem:
        raise fail(str(problem)) from None
    environment.prepare()
    return root
