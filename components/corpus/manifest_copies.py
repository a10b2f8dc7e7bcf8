"""Manifests made from a manifest on disk: some columns anew, some rows, the rest copied through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from components.corpus.manifest import SCHEMA, to_arrow
from components.corpus.manifest_columns import frame_of, manifest_batches
from components.files.parquet_files import TableStream


def copy_manifest(
    source: Path, changed: pd.DataFrame, outputs: Mapping[Path, np.ndarray | None]
) -> None:
    """Write manifests in one pass over `source`; only a few thousand rows are in memory.

    Args:
        source: manifest.
        changed: columns that replace those of `source`, a row for each of its rows.
        outputs: what to write, each with the numbers of the rows that it gets; None: all.

    Raises:
        ValueError: `source` is no manifest; a column of `changed` does not fit the schema; or their
            rows differ in number.
    """
    fields = pa.schema([field for field in SCHEMA if field.name in changed.columns])
    copied = [name for name in SCHEMA.names if name not in changed.columns]
    with ExitStack() as stack:
        streams = [
            (stack.enter_context(TableStream(path, SCHEMA)), _mask(rows, len(changed)))
            for path, rows in outputs.items()
        ]
        start = 0
        # Plain text: these batches are written, not compared, and the schema knows no dictionaries.
        for batch in manifest_batches(source, copied, code_text=False):
            stop = start + len(batch)
            anew = to_arrow(changed.iloc[start:stop], fields)
            # Rows are joined by position, so another number of them means another manifest.
            if len(anew) < len(batch):
                raise ValueError(f"{source} has more rows than the {len(changed)} changed ones")
            table = _table(batch, anew)
            for stream, mask in streams:
                stream.add(table if mask is None else table.filter(pa.array(mask[start:stop])))
            start = stop
        if start != len(changed):
            raise ValueError(
                f"{source} has {start} rows, fewer than the {len(changed)} changed ones"
            )


def rewrite_manifest(
    source: Path,
    read: Sequence[str],
    change: Callable[[pd.DataFrame], pd.DataFrame],
    output: Path,
) -> None:
    """Write a manifest whose changed columns are made batch by batch.

    Args:
        source: manifest.
        read: columns that `change` is given, of a few thousand rows in order.
        change: gives the columns that replace those of `source`, a row for each row.
        output: may not be `source`.

    Raises:
        ValueError: `source` is no manifest, or a changed column does not fit the schema.
    """
    with TableStream(output, SCHEMA) as stream:
        for batch in manifest_batches(source, SCHEMA.names, code_text=False):
            changed = change(frame_of(batch, read))
            fields = pa.schema([field for field in SCHEMA if field.name in changed.columns])
            stream.add(_table(batch, to_arrow(changed, fields)))


def _mask(rows: np.ndarray | None, count: int) -> np.ndarray | None:
    if rows is None:
        return None
    mask = np.zeros(count, dtype=bool)
    mask[rows] = True
    return mask


def _table(batch: pa.RecordBatch, anew: pa.Table) -> pa.Table:
    columns = []
    for field in SCHEMA:
        if field.name in anew.column_names:
            columns.append(anew[field.name])
        elif field.name in batch.schema.names:
            columns.append(batch[field.name])
        else:
            # A column that manifests of an older version lack.
            columns.append(pa.nulls(len(batch), field.type))
    return pa.Table.from_arrays(columns, schema=SCHEMA)
