"""What a reader of a source gives: records, losses, and after each file its own count of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.corpus.listing.source_files import is_of_system


@dataclass(frozen=True)
class SourceRecord:
    """One record of a source, or the place of one that cannot be read."""

    place: str
    """File and position, such as "list.csv:12"; unique within a source."""
    values: dict[str, Any] | None
    """None: the record is broken."""
    problem: str = ""
    units: int = 1
    """Lines (rows, members) of the file that it stands for; 0 when it stands for the file."""


@dataclass(frozen=True)
class SourceEnd:
    """The reader's count of one file, given after its last record.

    `total` equals the units of the file's records and losses plus the values of `apart`, or a
    reader has dropped something: `Ledger` checks it.
    """

    file: str
    unit: str
    """What is counted: "lines", "rows", "members" or "records"."""
    total: int
    """All of them."""
    apart: Mapping[str, int] = field(default_factory=dict)
    """What belongs to no record by its nature, such as {"header": 1, "blank": 2}."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Oddities that cost nothing, such as {"loosely_quoted": 3}."""


SourceItem = SourceRecord | SourceEnd


def source_files(source: Path, endings: tuple[str, ...], shown: str) -> list[Path]:
    """The file itself, or the files of a folder (recursively) in sorted order.

    Args:
        source: file or folder.
        endings: lower case, with the dot.
        shown: how messages name the source.

    Raises:
        ValueError: missing, unreadable or nothing inside.
    """
    advice = f"point ingest.source at a file or folder of {', '.join(endings)}"
    if not source.exists():
        raise ValueError(f"{shown}: no such file or folder; {advice}")
    if source.is_file():
        if not source.name.lower().endswith(endings):
            raise ValueError(f"{shown}: unknown kind of file; {advice}")
        return [source]
    # By text, not by `Path`: parts compare differently, and on Windows by another separator.
    inside = sorted(source.rglob("*"), key=lambda path: path.relative_to(source).as_posix())
    inside = [path for path in inside if not any(map(is_of_system, path.relative_to(source).parts))]
    named = [path for path in inside if path.name.lower().endswith(endings) and not path.is_dir()]
    for path in named:
        # Passed over without a word it would be a list less, perhaps of millions.
        if not path.is_file():
            what = "a link that leads to no file" if path.is_symlink() else "no regular file"
            raise ValueError(f"{shown_path(path, source, shown)}: {what}; mend or remove it")
    if not named:
        others = [path for path in inside if not path.is_dir()]
        found = "no files inside"
        if others:
            found = f"none of its {len(others)} files is read, such as {shown_name(others[0])}"
        raise ValueError(f"{shown}: {found}; {advice}")
    return named


def shown_name(path: Path) -> str:
    """A file's name on one line, whatever it holds."""
    return path.name.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")


def place_of(path: Path, source: Path) -> str:
    """Name of a list file below the source, with slashes."""
    return path.name if path == source else path.relative_to(source).as_posix()


def shown_path(path: Path, source: Path, shown: str) -> str:
    """How messages name a file of a source that they name `shown`."""
    return shown if path == source else f"{shown}/{place_of(path, source)}"
