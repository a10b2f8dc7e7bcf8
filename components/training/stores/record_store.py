"""What every store of fixed-size records has in common: identity, look-up, reading, writing.

A store is a folder with `index.parquet` (a row per sample), `store.json` (what made the records,
and what was left out) and shards of raw records. `StoreKind` says what differs from kind to kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from components.training.stores.record_reader import (
    Extents,
    RecordCorrupt,
    RecordReader,
    Verify,
)
from components.training.stores.record_writer import (
    INDEX_FILE,
    MIB,
    STORE_FILE,
    RecordWriter,
)
from components.training.stores.sample_ids import IdTable, Integers
from components.training.stores.stored_tensors import StoreDtype
from components.training.stores.table_digest import table_digest


@dataclass(frozen=True)
class StoreKind:
    """What one kind of store is, and how it speaks of itself."""

    name: str
    """In `store.json`."""
    record: str
    """Completes "image x has no ...": what one record is."""
    stage: str
    """Pipeline stage that makes the store."""
    version: int
    """Of the layout."""
    columns: tuple[str, ...]
    """Of the index, in order."""
    # By kind: one rule for all would make every store of the other kind stale.
    identity: tuple[str, ...]
    """Columns that the digest covers."""
    incomplete: type[RuntimeError]
    """Raised where there is no finished store."""
    corrupt: type[RuntimeError]
    """Raised for a record whose bytes are not the ones that were written."""
    remedy: str = ""
    """Ends the message about a damaged record; `{shard}` is its file."""

    def digest(self, index: pd.DataFrame) -> str:
        """Sha256 of an index, whatever wrote its file and in whatever order its rows stand."""
        return table_digest(index, self.identity, key="image_id", version=self.version)


class RecordStore:
    """Read access by image id; every read is verified unless told otherwise."""

    kind: ClassVar[StoreKind]

    def __init__(self, folder: Path, *, verify: Verify = "always") -> None:
        """Open a finished store.

        Args:
            folder: of the store.
            verify: when record hashes are compared, as in `RecordReader`.

        Raises:
            RuntimeError: `kind.incomplete`: no index (the stage has not finished), or another
                layout.
        """
        self.folder = folder
        # Held as a whole, since every step looks up the samples of its batch.
        self.index, self.about = read_store(folder, self.kind)
        # Its own table and not the index of a data frame, which holds a Python string for every id.
        self._rows = IdTable(self.index["image_id"])
        self._reader = RecordReader(folder, Extents.of(self.index), verify=verify)
        # From the index alone, so opening a store reads no shard.
        self.digest = self.kind.digest(self.index)
        """See `StoreKind.digest`: stores of equal digest hold equal records."""

    def __len__(self) -> int:
        """Number of rows of the index."""
        return len(self.index)

    def __contains__(self, image_id: object) -> bool:
        """Whether the image has a record."""
        return self._rows.row(image_id) is not None

    def _rows_of(self, image_ids: Sequence[str]) -> Integers:
        """Index rows of images.

        Raises:
            KeyError: of the first image that has no record.
        """
        try:
            return self._rows.rows(image_ids)
        except KeyError as unknown:
            # Named in full: the bare key says neither which store nor what is missing.
            raise KeyError(
                f"image {unknown.args[0]} has no {self.kind.record} in {self.folder}"
            ) from None

    def _read_into(self, rows: Integers, out: Tensor) -> None:
        """Fill a contiguous tensor (B, ...), one record of index row `rows[i]` each.

        Raises:
            RuntimeError: `kind.corrupt`: a record is cut off or its hash differs.
        """
        try:
            # As bytes, because NumPy has no bfloat16; a view, so that nothing is copied.
            self._reader.read_into(rows.tolist(), out.view(torch.uint8).flatten(1).numpy())
        except RecordCorrupt as problem:
            # The empty prompt has the empty id, which a message would show as nothing.
            image_id = self.index["image_id"].iloc[problem.row] or "(empty prompt)"
            raise self.kind.corrupt(
                f"shard {problem.shard}, image {image_id}: {problem.problem}; "
                f"`ultraflux stores verify {self.folder}` lists all such records"
                + self.kind.remedy.format(shard=problem.shard)
            ) from None


def read_store(folder: Path, kind: StoreKind) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What stands beside the shards of a finished store: (index, content of `store.json`).

    Raises:
        RuntimeError: `kind.incomplete`: no index (the stage has not finished), or another layout.
    """
    # The index is written last, so where it is the shards are.
    path = folder / INDEX_FILE
    if not path.exists():
        raise kind.incomplete(f"{folder}: no {INDEX_FILE}; run the stage `{kind.stage}` first")
    index = pd.read_parquet(path)
    # An older layout is no store for this code; the stage makes it again.
    missing = [name for name in kind.columns if name not in index.columns]
    if missing or not (folder / STORE_FILE).exists():
        lacking = f"columns {missing} are missing" if missing else f"no {STORE_FILE}"
        raise kind.incomplete(f"{path}: {lacking}; run the stage `{kind.stage}` again")
    return index, json.loads((folder / STORE_FILE).read_text("utf-8"))


class StoreWriter:
    """Makes one store of a kind: records appended to a work folder, published at the end."""

    def __init__(
        self,
        kind: StoreKind,
        folder: Path,
        *,
        key: str,
        dtype: StoreDtype,
        encoder_digest: str,
        shard_mb: float,
        depends_on: Mapping[str, Any] | None = None,
    ) -> None:
        """Open or continue the work folder.

        Args:
            kind: of the store.
            folder: private to this writer (created when missing).
            key: the entry of a row that names its record.
            dtype: of the stored tensors.
            encoder_digest: of the weights that make the records; work of others is discarded.
            shard_mb: a shard takes no further record beyond this size in MiB (at least one record).
            depends_on: what else all records depend on, JSON-able.
        """
        self._kind = kind
        # In the header too: work in another precision or by other weights is discarded.
        self._common = {"dtype": dtype, "encoder_digest": encoder_digest}
        self.records = RecordWriter(
            folder,
            key=key,
            header={"version": kind.version, **self._common, **(depends_on or {})},
            shard_bytes=int(shard_mb * MIB),
        )

    def publish(
        self,
        destination: Path,
        index: pd.DataFrame,
        provenance: Mapping[str, Any] | None = None,
        rejected: Mapping[str, str] | None = None,
    ) -> None:
        """Make the store in `destination`; see `RecordWriter.publish`.

        Args:
            destination: folder of the store.
            index: a row per sample, with all columns but those that all rows share.
            provenance: how the records were made, JSON-able.
            rejected: reason by image id of what has no record.
        """
        # In the order of the ids, so that the file does not tell in which order photographs failed.
        reasons = sorted((rejected or {}).items())
        about = {
            "kind": self._kind.name,
            "version": self._kind.version,
            "provenance": dict(provenance or {}),
            "rejected": [{"image_id": name, "error": reason} for name, reason in reasons],
        }
        # Exactly the declared columns in the declared order, whatever rows carried beside them.
        whole = index.assign(**self._common).loc[:, list(self._kind.columns)]
        self.records.publish(destination, whole, about)
