"""Comma-separated values from strangers: a stray quotation mark costs its line and no other.

RFC 4180 lets a quoted field run over many lines, so one mark too many swallows what follows it.
Here a field runs on only as long as no line within it could be a record of its own: as many cells
as the heading, with an address where addresses stand.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TextIO

from components.corpus.sources.records.address_columns import address_column, is_address
from components.corpus.sources.records.source_records import SourceEnd, SourceRecord
from components.corpus.sources.records.text_lines import LONGEST_LINE, Lines, is_too_long

LONGEST_FIELD_LINES = 1000
"""A quoted field over more lines is a stray mark: captions have a few."""


def split_line(line: str, separator: str) -> list[str] | None:
    """The cells of a line that is a record by itself; None if a quoted field goes on after it.

    Raises:
        csv.Error: no such record.
    """
    if '"' not in line:
        # What the parser below gives, at a third of its time.
        return line.rstrip("\r\n").split(separator)
    # The second line shows whether the reader wanted one: then a quoted field is still open.
    reader = csv.reader([line, "\n"], delimiter=separator)
    cells = next(reader)
    return cells if reader.line_num == 1 else None


def named_separator(line: str) -> str | None:
    """The separator that Excel names in a line of its own before the heading ("sep=;")."""
    text = line.strip("\r\n")
    return text[4] if len(text) == 5 and text[:4].lower() == "sep=" else None


def headings(cells: Sequence[str]) -> list[str]:
    """Names of the columns; a repeated one gets its number, so that no cell is overwritten."""
    seen: Counter[str] = Counter()
    names: dict[str, None] = {}
    for cell in cells:
        seen[cell] += 1
        name = cell
        # A column may be called "caption.2" by itself.
        while name in names:
            name = f"{cell}.{max(seen[cell], 2)}"
            seen[cell] += name in names
        names[name] = None
    return list(names)


class SeparatedValues:
    """Records of one file.

    Args:
        file: opened with newline="".
        name: of the file in places.
        separator: one character; a line that names another before the heading decides.
        columns: names of the columns; None if the first line that is not blank holds them.
        url_column: see `address_column`.
    """

    def __init__(
        self,
        file: TextIO,
        name: str,
        separator: str,
        columns: Sequence[str] | None,
        url_column: str | None,
    ) -> None:
        # The default of 128 KiB ends the whole file at one long caption; the length of lines is
        # bounded by `Lines`, and a C long has 32 bits on some platforms.
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        self._lines = Lines(file)
        self._name = name
        self._separator = separator
        self._url_column = url_column
        self.columns: list[str] = []
        """Names of the columns; empty until the heading is read."""
        self._url_at: int | None = None
        if columns is not None:
            self._name_columns(list(columns))
        self._apart: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()

    def records(self) -> Iterator[SourceRecord]:
        """Every record and every loss.

        Raises:
            READ_ERRORS: the file ends early.
        """
        while (line := self._lines.take()) is not None:
            number = self._lines.number
            if not line.strip("\r\n"):
                self._apart["blank"] += 1
                continue
            if not self.columns and (named := named_separator(line)) is not None:
                self._separator = named
                self._apart["header"] += 1
                continue
            cells, problem = self._cells(line)
            # Physical lines, because that is what `Lines` counts on the other side of the ledger.
            units = self._lines.number - number + 1
            if not self.columns and cells is not None:
                self._name_columns(cells)
                self._apart["header"] += units
                continue
            # Fewer cells are common (empty ones at the end left out); more mean that a separator
            # stands inside a cell, and then every later cell is another column's.
            if len(cells or ()) > len(self.columns):
                problem = f"{len(cells or ())} cells under {len(self.columns)} headings"
                cells = None
            values = None if cells is None else dict(zip(self.columns, cells, strict=False))
            yield SourceRecord(f"{self._name}:{number}", values, problem, units)

    def end(self) -> SourceEnd:
        """The count of lines so far."""
        return SourceEnd(self._name, "lines", self._lines.read, self._apart, self._notes)

    def _name_columns(self, cells: list[str]) -> None:
        self.columns = headings(cells)
        self._url_at = address_column(self.columns, self._url_column)

    def _cells(self, line: str) -> tuple[list[str] | None, str]:
        """Cells of the record that begins on the line taken last, or why it is none."""
        if is_too_long(line):
            return None, f"longer than {LONGEST_LINE} characters"
        try:
            cells = split_line(line, self._separator)
            if cells is None:
                return self._cells_over_lines(line)
            if '"' in line and not _is_strict(line, self._separator):
                self._notes["loosely_quoted"] += 1
        except csv.Error as problem:
            return None, f"not CSV: {problem}"
        return cells, ""

    def _cells_over_lines(self, line: str) -> tuple[list[str] | None, str]:
        """A record whose quoted field goes on, if it ends well; otherwise no line but the first."""
        stopped = "of the file"
        start = self._lines.number

        def lines() -> Iterator[str]:
            nonlocal stopped
            yield line
            for number, following in enumerate(self._lines.ahead(), start=1):
                if self._could_be_a_record(following):
                    stopped = f"of line {start + number - 1}, and the next is a record of its own"
                    return
                if number == LONGEST_FIELD_LINES:
                    stopped = f"of line {start + number - 1}, {number} lines on"
                    return
                yield following

        reader = csv.reader(lines(), delimiter=self._separator, strict=True)
        try:
            cells = next(reader)
        except csv.Error as problem:
            if "unexpected end" in str(problem):
                return None, f"a quotation mark opens and does not close by the end {stopped}"
            return None, "a quotation mark opens here, and the next one closes nothing"
        # Only now: a field that does not end costs the line where it began, and the next ones are
        # read as records again.
        self._lines.skip(reader.line_num - 1)
        return cells, ""

    def _could_be_a_record(self, line: str) -> bool:
        if self._url_at is None or (self._separator not in line and len(self.columns) > 1):
            return False
        cells = split_line(line, self._separator)
        return (
            cells is not None
            and len(cells) == len(self.columns)
            and is_address(cells[self._url_at])
        )


def _is_strict(line: str, separator: str) -> bool:
    """Whether quotation marks stand only where RFC 4180 has them."""
    try:
        next(csv.reader([line], delimiter=separator, strict=True))
    except csv.Error:
        return False
    return True
