"""The commands that messages tell a reader to run: an optional library, and weights.

They are written here alone, so that one test can hold all of them to what pip and the hub's client
accept. Nothing is installed or fetched by this project.
"""

from __future__ import annotations

import shlex
from pathlib import Path


def install_hint(extra: str | None = None) -> str:
    """The command that adds an optional part to the environment of this clone.

    The project is on no package index, so the name alone would find nothing: pip reads the clone.

    Args:
        extra: of `project.optional-dependencies` in pyproject.toml; None for what every install
            has.
    """
    return (
        "python -m pip install -e ." if extra is None else f"python -m pip install -e '.[{extra}]'"
    )


def package_hint(package: str) -> str:
    """The command that adds a package that no part of the project asks for.

    Args:
        package: its name on the package index.
    """
    return f"python -m pip install {shlex.quote(package)}"


def download_command(
    repository: str,
    into: str | Path,
    *files: str,
    include: tuple[str, ...] = (),
    dataset: bool = False,
) -> str:
    """The command that gets weights or data from the hub, with its own client.

    Args:
        repository: such as "owner/name".
        into: folder, from the root of the clone.
        files: of the repository; all of it without any.
        include: patterns instead of names, such as "vae/*".
        dataset: whether it is a repository of data.

    Raises:
        ValueError: names and patterns together, of which the client ignores the patterns.
    """
    if files and include:
        raise ValueError(f"{repository}: name files, or give patterns; the client takes one")
    words = ["hf", "download", repository, *files]
    if dataset:
        words += ["--repo-type", "dataset"]
    for pattern in include:
        # One option per pattern: a second word after --include would be taken for a file's name.
        words += ["--include", pattern]
    return shlex.join([*words, "--local-dir", str(into)])


def fetch_command(address: str, into: str | Path) -> str:
    """The command that gets one file that no client of a hub has.

    Args:
        address: of the file itself; a page in its place is an error (`--fail`).
        into: file, from the root of the clone; folders are made.
    """
    return shlex.join(["curl", "--fail", "--create-dirs", "-Lo", str(into), address])
