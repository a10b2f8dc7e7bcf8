"""Lists that would be read as something else are refused before a line of them is consumed.

Each refusal is one line: the file, what was found in it, and the setting that says how to read it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from components.corpus.sources.records.address_columns import (
    address_column,
    described,
    is_address,
)
from components.corpus.sources.records.json_values import parse_json
from components.corpus.sources.records.separated_values import named_separator, split_line
from components.corpus.sources.records.source_records import shown_path
from components.corpus.sources.records.text_lines import (
    READ_ERRORS,
    Lines,
    foreign_encoding,
    open_text,
    wrong_encoding,
)
from components.settings.corpus import ListSettings

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_HEAD_LINES = 1000
_MAGIC_BYTES = 64
_LINES_ABOVE = 20
"""Within so many lines a heading is looked for that is not the first."""
_CONTAINERS = {
    b"PK\x03\x04": "a ZIP archive or workbook",
    b"\xd0\xcf\x11\xe0": "an old workbook",
    b"PAR1": "a Parquet file",
    b"SQLite": "an SQLite database",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "gzipped",
}


def list_kind(path: Path) -> str:
    """The reader for a list by its ending: "csv", "tsv", "jsonl" or "parquet"."""
    ending = Path(path.name.lower().removesuffix(".gz")).suffix.removeprefix(".")
    return "jsonl" if ending == "ndjson" else ending


def separator_of(path: Path, lists: ListSettings) -> str:
    """What stands between the cells of a file."""
    return lists.separator or ("\t" if list_kind(path) == "tsv" else ",")


def refuse_misread(paths: list[Path], source: Path, shown: str, lists: ListSettings) -> None:
    """Look at every list: encoding, separators, heading, a column of addresses.

    Files that cannot be read at all are left to the reader, which counts them.

    Raises:
        ValueError: one would be misread; one line.
    """
    misread = []
    for path in paths:
        try:
            problem = _misreading(path, lists)
        except UnicodeError as wrong:
            problem = wrong_encoding(wrong, lists.encoding)
        # Such a file is a counted loss; only what would be read wrongly stops the run.
        except READ_ERRORS:
            continue
        if problem is not None:
            misread.append(f"{shown_path(path, source, shown)}: {problem}")
    if misread:
        more = f" (and {len(misread) - 1} more lists)" if len(misread) > 1 else ""
        raise ValueError(misread[0] + more)


def _misreading(path: Path, lists: ListSettings) -> str | None:
    kind = list_kind(path)
    if kind == "parquet":
        return _of_parquet(path, lists)
    # gzip is expected behind .gz, and what is inside is looked at as text.
    container = None if path.suffix.lower() == ".gz" else _container(path)
    if container is not None:
        return f"not text but {container}; name it by what it is, or export it as UTF-8 text"
    if lists.encoding is None and (found := foreign_encoding(path)) is not None:
        return found
    head = list(islice(_head(path, lists), _HEAD_LINES))
    if not head:
        return None
    return _of_jsonl(head, lists) if kind == "jsonl" else _of_csv(path, head, lists)


def _container(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(_MAGIC_BYTES)
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<":
        return "a web page or XML"
    return next((name for magic, name in _CONTAINERS.items() if start.startswith(magic)), None)


def _head(path: Path, lists: ListSettings) -> Iterator[str]:
    """The first lines that are not blank."""
    with open_text(path, lists.encoding) as file:
        lines = Lines(file)
        while (line := lines.take()) is not None:
            if line.strip():
                yield line


def _of_parquet(path: Path, lists: ListSettings) -> str | None:
    try:
        names = pq.read_schema(path).names
    except pa.ArrowException:
        return None
    if address_column(names, lists.url_column) is not None:
        return None
    return _no_addresses("column", names, lists, "the one that holds addresses")


def _of_jsonl(head: list[str], lists: ListSettings) -> str | None:
    names: dict[str, None] = {}
    for number, line in enumerate(head):
        try:
            values = parse_json(line)
        except ValueError:
            # A pretty-printed array: its first line is no JSON by itself and says enough.
            values = [{}] if number == 0 and line.lstrip().startswith("[") else None
        if number == 0 and isinstance(values, list) and any(isinstance(v, dict) for v in values):
            return (
                "one JSON array, not an object per line; name it .json and set ingest.kind to "
                "multiaspect"
            )
        if isinstance(values, dict):
            if address_column(list(values), lists.url_column) is not None:
                return None
            names.update(dict.fromkeys(values))
    if not names:
        return None
    return _no_addresses("field", list(names), lists, "the one that holds addresses")


def _of_csv(path: Path, head: list[str], lists: ListSettings) -> str | None:
    separator = separator_of(path, lists)
    if lists.columns is None and (named := named_separator(head[0])) is not None:
        separator, head = named, head[1:]
        if not head:
            return None
    cells = list(lists.columns) if lists.columns is not None else _heading(head, separator)
    if cells is None:
        return "the quotation mark in its heading is never closed"
    if address_column(cells, lists.url_column) is not None:
        return None
    if lists.columns is not None:
        return _no_addresses("column", cells, lists, "one of ingest.lists.columns")
    # A guess would be wrong for a list of one column; a remedy is named instead, and a person
    # decides.
    for other, name in SEPARATORS.items():
        names = _heading(head, other)
        if other != separator and names and address_column(names, lists.url_column) is not None:
            return _no_addresses("column", cells, lists) + (
                f"its cells are separated by {name}: set ingest.lists.separator to "
                f"{json.dumps(other)}"
            )
    first = {other: _heading(head, other) or [] for other in (separator, *SEPARATORS)}
    for other, names in first.items():
        if any(_is_bare(cell) for cell in names):
            return _no_addresses("column", cells, lists) + _name_the_columns(
                names, other, separator
            )
    for above, line in enumerate(head[1:_LINES_ABOVE], start=1):
        names = split_line(line, separator) or []
        if len(names) > 1 and address_column(names, lists.url_column) is not None:
            return _no_addresses("column", cells, lists) + (
                f"its heading stands below {above} other lines: remove those"
            )
    return _no_addresses("column", cells, lists, _holding_addresses(cells, head, separator))


def _heading(head: list[str], separator: str) -> list[str] | None:
    """Cells of the first record, over several lines if it is quoted so; None: never closed."""
    try:
        cells = split_line(head[0], separator)
        if cells is None:
            cells = next(csv.reader(head, delimiter=separator, strict=True))
    except csv.Error:
        return None
    return cells


def _is_bare(cell: str) -> bool:
    """Whether a cell is an address and nothing beside it, as in the line of another separator."""
    return is_address(cell) and not any(mark in cell.strip() for mark in " ;\t|")


def _name_the_columns(cells: list[str], separator: str, declared: str) -> str:
    names = [f"column_{number}" for number in range(1, len(cells) + 1)]
    names[[is_address(cell) for cell in cells].index(True)] = "url"
    also = f" and ingest.lists.separator to {json.dumps(separator)}"
    listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return (
        "line 1 is no heading, it holds an address: set ingest.lists.columns to the names of its "
        f"cells, such as [{listed}]{also if separator != declared else ''}"
    )


def _holding_addresses(names: list[str], head: list[str], separator: str) -> str:
    for line in head[1:]:
        cells = split_line(line, separator) or []
        for name, cell in zip(names, cells, strict=False):
            if is_address(cell):
                return described([name])
    return "the one that holds addresses"


def _no_addresses(
    what: str, names: list[str], lists: ListSettings, column: str | None = None
) -> str:
    called = f" called {lists.url_column}" if lists.url_column is not None else ""
    found = f"no {what} of addresses{called}; {what}s are {described(names)}; "
    return found if column is None else f"{found}set ingest.lists.url_column to {column}"
