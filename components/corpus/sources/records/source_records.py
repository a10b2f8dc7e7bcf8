"""What a reader of a source gives: records, losses, and after each file its own count of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.corpus.listing.source_files import is_of_system
from components.telemetry.wording import legible

_NOTED_ENDINGS = 100


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
    """What is counted: "lines", "rows", "members", "records" or, of a folder, "files"."""
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
    inside = _inside(source)
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
            found = f"none of its {len(others)} files is read, such as {legible(others[0].name)}"
        raise ValueError(f"{shown}: {found}; {advice}")
    return named


def _inside(folder: Path) -> list[Path]:
    """What lies in a folder and is not the system's, in sorted order."""
    # By text, not by `Path`: parts compare differently, and on Windows by another separator.
    inside = sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix())
    return [path for path in inside if not any(map(is_of_system, path.relative_to(folder).parts))]


def files_not_read(source: Path, endings: tuple[str, ...]) -> tuple[SourceEnd, str] | None:
    """Files beside those that are read: their count by ending, and what to say of them.

    Args:
        source: file or folder.
        endings: of what is read, as for `source_files`.
    """
    others = [
        path
        for path in (_inside(source) if source.is_dir() else ())
        if not path.name.lower().endswith(endings) and not path.is_dir()
    ]
    if not others:
        return None
    endings_of = [path.suffix.lower() or "no ending" for path in others]
    by_ending = Counter(endings_of)
    # Of the commonest: a forgotten list rather than the one README beside it.
    example = others[endings_of.index(by_ending.most_common(1)[0][0])]
    # Names are a stranger's: a thousand endings must not make the account as long.
    apart = {f"not read, {ending}": n for ending, n in by_ending.most_common(_NOTED_ENDINGS)}
    if rest := len(others) - sum(apart.values()):
        apart["not read, other endings"] = rest
    files = "1 file is" if len(others) == 1 else f"{len(others)} files are"
    remark = f"{files} not read, such as {legible(example.name)}"
    return SourceEnd("beside what is read", "files", len(others), apart), remark


def place_of(path: Path, source: Path) -> str:
    """Name of a list file below the source, with slashes."""
    return path.name if path == source else path.relative_to(source).as_posix()


def shown_path(path: Path, source: Path, shown: str) -> str:
    """How messages name a file of a source that they name `shown`."""
    return shown if path == source else f"{shown}/{place_of(path, source)}"
