"""Tables that people wrote by hand, as CSV: nothing of a line is passed over without a word."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence


def written_columns(text: str) -> list[str]:
    """Names in the first line, in small letters; none where it is not CSV."""
    try:
        header = next(csv.reader(_lines(text)), [])
    except csv.Error:
        return []
    return [name.strip().casefold() for name in header]


def _lines(text: str) -> io.StringIO:
    return io.StringIO(text.removeprefix("\ufeff"), newline="")


def written_rows(
    text: str, where: str, known: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """("`where` line N", cells by column) of each row that is not blank; N is its first line.

    Args:
        text: of the file, with line ends as they are.
        where: its name in messages.
        known: columns that are read; others may be there, and twice.

    Raises:
        ValueError: a known column twice, more cells than columns, quotation marks that do not pair;
            one line.
    """
    columns = written_columns(text)
    twice = [name for name in known if columns.count(name) > 1]
    if twice:
        raise ValueError(f"{where}: two columns are named {twice[0]}")
    # Strict: a quotation mark too many would make one cell of many lines.
    reader = csv.reader(_lines(text), strict=True)
    # A mark that opens and does not close is found at the end of the file.
    first = 1
    try:
        next(reader, None)
        first = reader.line_num + 1
        for cells in reader:
            place = f"{where} line {first}"
            first = reader.line_num + 1
            # A comma inside a cell cuts it; spreadsheets leave empty ones at the end.
            if any(cell.strip() for cell in cells[len(columns) :]):
                names = "column" if len(columns) == 1 else "columns"
                raise ValueError(
                    f"{place}: {len(cells)} cells for {len(columns)} {names}; put quotes around "
                    f"a {known[0] if len(columns) == 1 else 'cell'} with commas"
                )
            if cells:
                yield place, dict(zip(columns, cells, strict=False))
    except csv.Error as problem:
        raise ValueError(f"{where} line {first}: not CSV: {problem}") from None
