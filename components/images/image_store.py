"""Originals packed by content address: tar shards and an index, read at random.

    data/images/
        index.parquet                   image_id, shard, offset, size, format; sorted by image_id
        a3-5f0c9e41b27d8806.tar         <sha256>.jpg, <sha256>.png, ... sorted; WebDataset's layout

An image's shard is decided by the first hexadecimal digits of its sha256, so adding or removing
pictures changes few shards, and no folder holds more than 4,097 files. The second part of a shard's
name is a digest of the image ids in it: a changed shard is a new file, and the index, replaced
last, is what makes a new version real. Bytes are believed only when their sha256 is the image id.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = "data/images"
"""Of the store, below the repository root."""
INDEX_NAME = "index.parquet"
INDEX_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        # Of the first byte of the original in the shard, and its length in bytes.
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        # File ending without the dot, by content.
        pa.field("format", pa.string(), nullable=False),
    ],
    metadata={b"ultraflux.image_store.version": b"1"},
)
SHARD_NAME = re.compile(r"[0-9a-f]{1,3}-[0-9a-f]{16}\.tar")
_IMAGE_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class PackedImage:
    """Where an original lies in a shard."""

    shard: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """As many bytes as the shard has there, unverified.

        Raises:
            OSError: no such shard, or it cannot be read.
        """
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def read_index(folder: Path) -> pd.DataFrame:
    """The index of a store, empty when there is none.

    An index may come from a remote that others write to: shard names that could lead outside the
    folder and impossible places are refused.

    Raises:
        ValueError: it is not an index of this version; one line.
    """
    path = folder / INDEX_NAME
    advice = "run `ultraflux corpus pack` again, or `dvc pull data/images`"
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        return INDEX_SCHEMA.empty_table().to_pandas()
    except (OSError, pa.ArrowException) as problem:
        detail = " ".join(str(problem).split())
        raise ValueError(f"{path}: not a readable index ({detail}); {advice}") from None
    if not table.schema.equals(INDEX_SCHEMA, check_metadata=True):
        raise ValueError(f"{path}: not an index of image shards in this version; {advice}")
    index = table.to_pandas()
    sound = (
        index["shard"].str.fullmatch(SHARD_NAME.pattern).all()
        and index["image_id"].str.fullmatch(_IMAGE_ID.pattern).all()
        and index["image_id"].is_monotonic_increasing
        and index["image_id"].is_unique
        and (index[["offset", "size"]] >= 0).all(axis=None)
    )
    if not sound:
        raise ValueError(f"{path}: rows that no store has written; {advice}")
    return index


class ImageStore:
    """Reads a store; its index is in memory (about 100 bytes an image), its shards are not.

    Args:
        folder: of the store; one that does not exist is an empty store.

    Raises:
        ValueError: see `read_index`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read_index(folder)
        # Fixed-width bytes: a search needs no Python object per image.
        self._ids = index["image_id"].to_numpy(dtype="S64")
        shards = pd.Categorical(index["shard"])
        self._shard_names = [str(name) for name in shards.categories]
        self._shards = np.asarray(shards.codes)
        self._offsets = index["offset"].to_numpy()
        self._sizes = index["size"].to_numpy()

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, image_id: str) -> PackedImage | None:
        """Where an original is, or None; its shard may not have been pulled yet."""
        key = image_id.encode()
        at = int(np.searchsorted(self._ids, key))
        if at == len(self._ids) or self._ids[at] != key:
            return None
        name = self._shard_names[self._shards[at]]
        return PackedImage(self.folder / name, int(self._offsets[at]), int(self._sizes[at]))
