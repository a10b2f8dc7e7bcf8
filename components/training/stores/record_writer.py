"""Append-only writing of fixed-record shards that survives a kill after any batch.

The work folder holds shards `<series>-<number>.bin` and `journal.jsonl`. After every batch the
shards are flushed, then one line is added to the journal. Opening the folder again keeps the
journalled batches, cuts off whatever came after them, and goes on: the same bytes however often it
was interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import xxhash

from components.files.whole_files import flush, whole_file, write_text

INDEX_FILE = "index.parquet"
STORE_FILE = "store.json"
JOURNAL_FILE = "journal.jsonl"
MIB = 2**20


class RecordWriter:
    """Shards and journal of one store in the making."""

    def __init__(
        self, folder: Path, *, key: str, header: Mapping[str, Any], shard_bytes: int
    ) -> None:
        """Open or continue the work folder.

        Args:
            folder: private to this writer (created when missing).
            key: the entry of a row that names its record; no two records have the same.
            header: what all records depend on, JSON-able; work under another one is discarded.
            shard_bytes: a shard takes no further record beyond this size (at least one record).
        """
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        """As appended, with shard, offset, nbytes and xxh64."""
        self._key, self._shard_bytes = key, shard_bytes
        self._journal = folder / JOURNAL_FILE
        # The shard size too: it decides where a record lies.
        self._header = {**header, "shard_bytes": shard_bytes}
        self._keys: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._open: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def stored(self) -> frozenset[str]:
        """Keys of the records that are safely stored."""
        return frozenset(self._keys)

    def append(
        self, series: str, rows: Sequence[Mapping[str, Any]], records: Sequence[bytes]
    ) -> None:
        """Store one batch; when this returns a kill cannot lose it.

        Args:
            series: whose shards take the records.
            rows: one per record, JSON-able, with the key.
            records: of one size within a series.

        Raises:
            ValueError: a key is stored already.
        """
        placed, chunks = [], []
        # All keys before the first byte: a refused batch leaves nothing behind.
        for row in rows:
            if row[self._key] in self._keys:
                raise ValueError(f"{self._key} {row[self._key]} is stored already")
        # Places first, bytes afterwards: a batch may reach into the next shard.
        for row, record in zip(rows, records, strict=True):
            shard, offset = self._place(series, len(record))
            where = {"shard": shard, "offset": offset, "nbytes": len(record)}
            placed.append({**row, **where, "xxh64": xxhash.xxh64_hexdigest(record)})
            chunks.append((shard, record))
        # One write and one flush for each shard that the batch reaches.
        for shard in sorted({shard for shard, _ in chunks}):
            self._detach(shard)
            with (self.folder / shard).open("ab") as file:
                file.write(b"".join(record for name, record in chunks if name == shard))
                file.flush()
                os.fsync(file.fileno())
        # Records are on the disk: only now the journal may promise them.
        self.rows += placed
        self._keys |= {row[self._key] for row in placed}
        with self._journal.open("a", encoding="utf-8") as journal:
            # A line per batch: it is there whole or not at all, and so is the batch.
            journal.write(json.dumps(placed) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def publish(self, destination: Path, index: pd.DataFrame, about: Mapping[str, Any]) -> None:
        """Make the store in `destination` (other files in it stay, old shards go).

        Shards are hard links where the file system allows, so nothing is held twice. The index
        comes last: a kill or a power cut leaves either no index or a whole store.

        Args:
            destination: folder of the store.
            index: one row per sample.
            about: JSON document `store.json`: provenance, and what was left out.
        """
        destination.mkdir(parents=True, exist_ok=True)
        # First: without its index the folder is no store, whatever else is in it.
        (destination / INDEX_FILE).unlink(missing_ok=True)
        # On the disk too: after a power cut an index must not come back to shards that are gone.
        flush(destination)
        # With whatever a kill has left of one that was being copied.
        for old in destination.glob("*.bin*"):
            old.unlink()
        # Of the journal and not of the folder: a kill may have left a shard that nothing names.
        for shard in sorted(self._sizes):
            with whole_file(destination / shard, durable=True) as temporary:
                try:
                    # The work folder keeps its name of the same bytes, so a later run goes on from
                    # it.
                    os.link(self.folder / shard, temporary)
                except OSError:
                    shutil.copyfile(self.folder / shard, temporary)
        text = json.dumps(dict(about), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_text(destination / STORE_FILE, text, durable=True)
        # Last, since readers take the index for the sign of a whole store.
        with whole_file(destination / INDEX_FILE, durable=True) as temporary:
            index.to_parquet(temporary, index=False)

    def remove_journal(self) -> None:
        """The shards are a store where they lie: an index beside them names every record.

        For stores that need no name of their own; the writer is of no use afterwards.
        """
        self._journal.unlink()

    def _place(self, series: str, nbytes: int) -> tuple[str, int]:
        """Reserve room: (shard, offset)."""
        number = self._open.setdefault(series, 0)
        used = self._sizes.get(shard := f"{series}-{number:05d}.bin", 0)
        # An empty shard takes any record, or one that is too large would find no place at all.
        if used and used + nbytes > self._shard_bytes:
            self._open[series] = number + 1
            shard, used = f"{series}-{number + 1:05d}.bin", 0
        self._sizes[shard] = used + nbytes
        return shard, used

    def _detach(self, shard: str) -> None:
        """Break the hard link of a published shard, so that appending never alters the store."""
        path = self.folder / shard
        if path.exists() and path.stat().st_nlink > 1:
            # Copied under another name and renamed: the published name keeps the old bytes.
            with whole_file(path) as temporary:
                shutil.copyfile(path, temporary)

    def _resume(self) -> None:
        """Take over journalled batches; start afresh where the header or a shard does not fit."""
        lines = []
        if self._journal.exists():
            text = self._journal.read_text(encoding="utf-8")
            # A line without its newline was cut off by a kill.
            lines = text[: text.rfind("\n") + 1].splitlines()
        # Another encoder, precision or shard size would give other records: nothing is kept.
        if lines and json.loads(lines[0]) == self._header:
            for line in lines[1:]:
                self._take_over(json.loads(line))
        # A shard shorter than its journal has lost promised bytes, as after a copy without all
        # files. Which records are good is not worth finding out: all are made again.
        if not self.rows or any(self._length(name) < size for name, size in self._sizes.items()):
            lines = [json.dumps(self._header)]
            self.rows, self._keys, self._sizes, self._open = [], set(), {}, {}
        for shard in self.folder.glob("*.bin*"):
            if shard.name not in self._sizes:
                shard.unlink()
            # What lies behind the last journalled record was never promised.
            elif shard.stat().st_size > self._sizes[shard.name]:
                os.truncate(shard, self._sizes[shard.name])
        write_text(self._journal, "".join(f"{line}\n" for line in lines), durable=True)

    def _take_over(self, batch: list[dict[str, Any]]) -> None:
        for row in batch:
            self.rows.append(row)
            self._keys.add(row[self._key])
            # Rows come in the order of writing, so the last one of a shard says how long it is.
            self._sizes[row["shard"]] = row["offset"] + row["nbytes"]
            series, _, number = row["shard"].removesuffix(".bin").rpartition("-")
            # Where the series goes on; earlier shards of it are closed for good.
            self._open[series] = max(int(number), self._open.get(series, 0))

    def _length(self, shard: str) -> int:
        path = self.folder / shard
        return path.stat().st_size if path.exists() else 0
