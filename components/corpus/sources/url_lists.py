"""Lists of photographs to fetch: CSV, JSONL and Parquet files, read as a stream of records.

Text may be gzipped (`list.csv.gz`) and is UTF-8, or UTF-16 behind its byte order mark, or what the
settings say; single wrong bytes become U+FFFD, which the tables of ingest count, and refuse in
addresses. A list that would be misread as a whole is refused first (`records.list_shapes`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from components.corpus.sources.records.address_columns import with_address
from components.corpus.sources.records.json_values import parse_json
from components.corpus.sources.records.list_shapes import list_kind, refuse_misread, separator_of
from components.corpus.sources.records.separated_values import SeparatedValues, headings
from components.corpus.sources.records.source_records import (
    SourceEnd,
    SourceItem,
    SourceRecord,
    place_of,
    source_files,
)
from components.corpus.sources.records.text_lines import (
    LONGEST_LINE,
    READ_ERRORS,
    Lines,
    is_too_long,
    open_text,
    read_problem,
)
from components.settings.corpus import ListSettings

_TEXT_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson")
LIST_ENDINGS = (*_TEXT_ENDINGS, *(f"{ending}.gz" for ending in _TEXT_ENDINGS), ".parquet")
_BATCH_ROWS = 1024


class _Reader(Protocol):
    def records(self) -> Iterator[SourceRecord]:
        """Every record and loss of one file."""

    def end(self) -> SourceEnd:
        """The count of what was read so far."""


class JsonLines:
    """One JSON object per line.

    Args:
        file: opened with newline="".
        name: of the file in places.
    """

    def __init__(self, file: TextIO, name: str) -> None:
        self._lines = Lines(file)
        self._name = name
        self._apart: Counter[str] = Counter()

    def records(self) -> Iterator[SourceRecord]:
        """Every record and every loss.

        Raises:
            READ_ERRORS: the file ends early.
        """
        while (line := self._lines.take()) is not None:
            if not line.strip():
                self._apart["blank"] += 1
                continue
            place = f"{self._name}:{self._lines.number}"
            if is_too_long(line):
                yield SourceRecord(place, None, f"longer than {LONGEST_LINE} characters")
                continue
            try:
                values = parse_json(line)
            except ValueError as problem:
                yield SourceRecord(place, None, str(problem))
                continue
            if isinstance(values, dict):
                yield SourceRecord(place, values)
            else:
                yield SourceRecord(place, None, f"a {type(values).__name__}, not an object")

    def end(self) -> SourceEnd:
        """The count of lines so far."""
        return SourceEnd(self._name, "lines", self._lines.read, self._apart)


class _ParquetRows:
    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._total = 0

    def records(self) -> Iterator[SourceRecord]:
        number = 0
        problem = "ends before the rows that its footer counts"
        try:
            with pq.ParquetFile(self._path) as file:
                self._total = file.metadata.num_rows
                for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                    # A row becomes a dictionary, in which the last of two equal names would stay.
                    for values, detail in _rows(batch.rename_columns(headings(batch.schema.names))):
                        number += 1
                        yield SourceRecord(f"{self._name}:{number}", values, detail)
        except (pa.ArrowException, OSError) as caught:
            problem = str(caught).splitlines()[0] if str(caught) else type(caught).__name__
        else:
            # The footer is a claim; rows are what came out.
            if number >= self._total:
                self._total = number
                return
        # The rows that did not come are one loss that stands for all of them, so the account
        # balances.
        self._total = max(self._total, number)
        yield SourceRecord(
            f"{self._name}:{number + 1}",
            None,
            f"broken Parquet file: {problem}",
            self._total - number,
        )

    def end(self) -> SourceEnd:
        return SourceEnd(self._name, "rows", self._total)


def _rows(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """Rows as Python values; where a whole batch cannot be converted, the rows that can."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        # One timestamp in the year 30,000 makes the whole batch fail; row by row it costs its row.
        for at in range(batch.num_rows):
            try:
                yield batch.slice(at, 1).to_pylist()[0], ""
            except (ValueError, OverflowError) as problem:
                yield None, f"a value that cannot be read: {' '.join(str(problem).split())}"
        return
    for values in rows:
        yield values, ""


def _items(reader: _Reader, name: str, url_column: str | None) -> Iterator[SourceItem]:
    try:
        for record in reader.records():
            if record.values is None or url_column is None:
                yield record
            else:
                values = with_address(record.values, url_column)
                yield SourceRecord(record.place, values, record.problem, record.units)
    except READ_ERRORS as problem:
        yield SourceRecord(name, None, read_problem(problem), units=0)
    yield reader.end()


def read_url_lists(source: Path, shown: str, lists: ListSettings) -> Iterator[SourceItem]:
    """Every record of every list, in sorted order of files, each file closed by its count.

    Args:
        source: list, or folder of lists.
        shown: how messages name it.
        lists: how lists are written that do not say it themselves.

    Raises:
        ValueError: no lists (see `source_files`), or one that would be misread (see
            `refuse_misread`); before the first record.
    """
    paths = source_files(source, LIST_ENDINGS, shown)
    refuse_misread(paths, source, shown, lists)
    return _all_items(paths, source, lists)


def _all_items(paths: list[Path], source: Path, lists: ListSettings) -> Iterator[SourceItem]:
    for path in paths:
        name = place_of(path, source)
        kind = list_kind(path)
        if kind == "parquet":
            yield from _items(_ParquetRows(path, name), name, lists.url_column)
            continue
        try:
            file = open_text(path, lists.encoding)
        except READ_ERRORS as problem:
            yield SourceRecord(name, None, read_problem(problem), units=0)
            yield SourceEnd(name, "lines", 0)
            continue
        with file:
            reader: _Reader = JsonLines(file, name)
            if kind != "jsonl":
                separator = separator_of(path, lists)
                reader = SeparatedValues(file, name, separator, lists.columns, lists.url_column)
            yield from _items(reader, name, lists.url_column)
