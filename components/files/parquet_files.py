"""Writing Parquet: whole or not at all, and the same bytes for the same rows.

Worker processes import this module, so it needs pyarrow alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_COMPRESSION = "zstd"
_SURROGATE = re.compile("[\ud800-\udfff]")
GROUP_ROWS = 16_384
"""Rows of one group: what a reader holds at a time, some 20 MB of a manifest with captions."""


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table beside `path` and rename it into place."""
    write_row_groups([table], table.schema, path)


class TableStream:
    """A Parquet file that grows table by table; in place when the block ends without an error.

    Groups have `group_rows` rows however the tables were cut, so equal rows give equal bytes.

    Args:
        path: where it will be.
        schema: of the tables.
        group_rows: rows that are held in memory and written together.
    """

    def __init__(self, path: Path, schema: pa.Schema, group_rows: int = GROUP_ROWS) -> None:
        self._path = path
        self._schema = schema
        self._group_rows = group_rows
        self._waiting = schema.empty_table()
        self._temporary = path.with_name(f".{path.name}.partial")

    def __enter__(self) -> TableStream:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._temporary, self._schema, compression=_COMPRESSION)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and len(self._waiting):
            self._writer.write_table(self._waiting.combine_chunks())
        self._writer.close()
        if kind is None:
            self._temporary.replace(self._path)

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        waiting = pa.concat_tables([self._waiting, table])
        while len(waiting) >= self._group_rows:
            self._writer.write_table(waiting.slice(0, self._group_rows).combine_chunks())
            waiting = waiting.slice(self._group_rows)
        # Copied, or the rest of a few rows would hold the whole table.
        self._waiting = waiting.combine_chunks() if len(waiting) < len(table) else waiting


class RowStream:
    """A Parquet file that grows row by row; in place when the block ends without an error.

    Args:
        path: where it will be.
        schema: of the rows.
        group_rows: rows that are held in memory and written together.
    """

    def __init__(self, path: Path, schema: pa.Schema, group_rows: int = 8192) -> None:
        self._schema = schema
        self._group_rows = group_rows
        self._rows: list[dict[str, Any]] = []
        self._tables = TableStream(path, schema, group_rows)

    def __enter__(self) -> RowStream:
        self._tables.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._rows:
            self._flush()
        self._tables.__exit__(kind, problem, trace)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; absent columns are null."""
        self._rows.append(row)
        if len(self._rows) == self._group_rows:
            self._flush()

    def _flush(self) -> None:
        self._tables.add(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows.clear()


def write_row_groups(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """Write tables of one `schema` to one file; one table is in memory at a time.

    A table of more than `GROUP_ROWS` becomes several row groups.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with pq.ParquetWriter(temporary, schema, compression=_COMPRESSION) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=GROUP_ROWS)
    temporary.replace(path)


def storable(text: str) -> str:
    """Text whose lone surrogates, which no UTF-8 file can hold, are U+FFFD as wrong bytes are."""
    # Not a question mark, which text has by itself: what is mended must be seen to be.
    return _SURROGATE.sub("\ufffd", text)
