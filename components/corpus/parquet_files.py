"""Writing Parquet: whole or not at all, and the same bytes for the same rows.

Worker processes import this module, so it needs pyarrow alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_COMPRESSION = "zstd"


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table beside `path` and rename it into place."""
    write_row_groups([table], table.schema, path)


def write_row_groups(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """Write tables of one `schema` as row groups of one file; one table is in memory at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with pq.ParquetWriter(temporary, schema, compression=_COMPRESSION) as writer:
        for table in tables:
            writer.write_table(table)
    temporary.replace(path)
