"""Latents of a corpus in fixed-record shards, one series of shards per aspect-ratio bucket.

Layout of a store folder: `index.parquet` and shards `<height>x<width>-<number>.bin`, raw
little-endian records without any framing. All records of a bucket have one size, so a shard is
read by position. Latents are stored normalised, (z - shift_factor) * scaling_factor: what the
transformer sees.

Written by `LatentStoreWriter`, which appends to a work folder, survives a kill after any batch and
publishes the store at the end: the same bytes however often it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import xxhash
from torch import Tensor

from components.training.checkpoints import write_atomically

INDEX_FILE = "index.parquet"
STORE_VERSION = 1
INDEX_COLUMNS = (
    "image_id",
    "split",
    "bucket",
    "height_px",
    "width_px",
    "latent_channels",
    "latent_h",
    "latent_w",
    "dtype",
    "shard",
    "offset",
    "nbytes",
    "xxh64",
    "encoder_digest",
)
StoreDtype = Literal["float32", "bfloat16"]
_ITEM_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2}
_MIB = 2**20


class LatentStoreIncomplete(RuntimeError):
    """The folder holds no finished store."""


class LatentCorrupt(RuntimeError):
    """A record whose bytes are not the ones that were written; names shard and image."""


def to_record(latent_CHW: Tensor, dtype: StoreDtype) -> bytes:
    """Bytes of one (C, h, w) latent, row-major, little-endian."""
    tensor = latent_CHW.detach().to("cpu", getattr(torch, dtype)).contiguous()
    # NumPy has no bfloat16, so its bits travel as 16-bit integers.
    bits = tensor.view(torch.int16) if dtype == "bfloat16" else tensor
    return np.ascontiguousarray(bits.numpy()).astype(bits.numpy().dtype.newbyteorder("<")).tobytes()


def from_record(record: bytes, shape: tuple[int, int, int], dtype: str) -> Tensor:
    """Inverse of `to_record`: (C, h, w) in the stored dtype."""
    if dtype == "bfloat16":
        bits = np.frombuffer(record, dtype="<i2").astype(np.int16)
        return torch.from_numpy(bits).view(torch.bfloat16).reshape(shape)
    return torch.from_numpy(np.frombuffer(record, dtype="<f4").astype(np.float32)).reshape(shape)


def index_digest(index: pd.DataFrame) -> str:
    """Sha256 over the rows of an index, independent of Parquet versions and of row order.

    The record hashes are among the columns, so it identifies every byte of the store.
    """
    rows = index.loc[:, list(INDEX_COLUMNS)].sort_values(["image_id"], kind="stable")
    lines = (json.dumps([str(value) for value in row]) for row in rows.itertuples(index=False))
    return hashlib.sha256("\n".join([f"v{STORE_VERSION}", *lines]).encode()).hexdigest()


class LatentStore:
    """Read access by image id; every read is verified."""

    def __init__(self, folder: Path) -> None:
        """Open a finished store.

        Raises:
            LatentStoreIncomplete: no index (encoding has not finished), or another layout.
        """
        path = folder / INDEX_FILE
        if not path.exists():
            raise LatentStoreIncomplete(f"{folder}: no {INDEX_FILE}; run the stage `latents` first")
        self.folder = folder
        self.index = pd.read_parquet(path)
        """One row per image, columns `INDEX_COLUMNS`; `bucket` is "<height>x<width>" in pixels."""
        missing = [name for name in INDEX_COLUMNS if name not in self.index.columns]
        if missing:
            raise LatentStoreIncomplete(f"{path}: columns {missing} are missing; encode again")
        self._row = {image_id: row for row, image_id in enumerate(self.index["image_id"])}
        self.digest = index_digest(self.index)
        """Sha256 of the index content."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.index)

    def __contains__(self, image_id: object) -> bool:
        """Whether the image has a latent."""
        return image_id in self._row

    def read(self, image_id: str) -> Tensor:
        """The normalised latent of one image.

        Returns:
            (C, h, w) float32 (stored bfloat16 is widened exactly).

        Raises:
            KeyError: the store has no such image.
            LatentCorrupt: the record is cut off or its hash differs.
        """
        if image_id not in self._row:
            raise KeyError(f"image {image_id} has no latent in {self.folder}")
        row = self.index.iloc[self._row[image_id]]
        shard = self.folder / str(row["shard"])
        try:
            with shard.open("rb") as file:
                file.seek(int(row["offset"]))
                record = file.read(int(row["nbytes"]))
        except FileNotFoundError:
            raise LatentCorrupt(f"shard {shard.name}: missing, needed for {image_id}") from None
        if xxhash.xxh64_hexdigest(record) != row["xxh64"]:
            raise LatentCorrupt(
                f"shard {shard.name}, image {image_id}: bytes {row['offset']} to "
                f"{row['offset'] + row['nbytes']} do not have hash {row['xxh64']}; encode again"
            )
        shape = (int(row["latent_channels"]), int(row["latent_h"]), int(row["latent_w"]))
        return from_record(record, shape, str(row["dtype"])).float()

    def read_batch(self, image_ids: Sequence[str]) -> Tensor:
        """Latents of images of one bucket, (B, C, h, w) float32, in the order asked for."""
        return torch.stack([self.read(image_id) for image_id in image_ids])


class LatentStoreWriter:
    """Appends batches to shards in a work folder; `publish` turns them into a store.

    After every batch the shards are flushed, then one line is added to `journal.jsonl`. Opening
    the folder again keeps the journalled batches, cuts off whatever came after them, and goes on.
    """

    def __init__(
        self, folder: Path, *, dtype: StoreDtype, shard_mb: float, encoder_digest: str
    ) -> None:
        """Open or continue the work folder.

        Args:
            folder: private to this writer (created when missing).
            dtype: of the stored latents.
            shard_mb: a shard takes no further record beyond this size in MiB (at least one record).
            encoder_digest: digest of the encoder weights; work of another encoder is discarded.
        """
        self.folder = folder
        self.dtype: StoreDtype = dtype
        self._shard_bytes = int(shard_mb * _MIB)
        self._encoder_digest = encoder_digest
        self._journal = folder / "journal.jsonl"
        self._header = {
            "version": STORE_VERSION,
            "dtype": dtype,
            "shard_bytes": self._shard_bytes,
            "encoder_digest": encoder_digest,
        }
        self._rows: list[dict[str, Any]] = []
        self._ids: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._open: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def stored(self) -> frozenset[str]:
        """Ids of the images that are safely stored."""
        return frozenset(self._ids)

    def append(
        self, bucket_hw: tuple[int, int], images: Sequence[tuple[str, str]], latents: Tensor
    ) -> None:
        """Store one batch; when this returns a kill cannot lose it.

        Args:
            bucket_hw: (height, width) in pixels.
            images: (image_id, split) in batch order.
            latents: (B, C, h, w), normalised, any floating dtype.

        Raises:
            ValueError: lengths differ, a latent is not finite, or an image was stored before.
        """
        if len(images) != len(latents):
            raise ValueError(f"{len(images)} images, but {len(latents)} latents")
        rows, chunks = [], []
        for (image_id, split), latent in zip(images, latents, strict=True):
            if image_id in self._ids:
                raise ValueError(f"image {image_id} is stored already")
            if not bool(torch.isfinite(latent).all()):
                raise ValueError(f"image {image_id}: its latent is not finite; check the encoder")
            record = to_record(latent, self.dtype)
            shard, offset = self._place(bucket_hw, len(record))
            rows.append(self._row(image_id, split, bucket_hw, latent, shard, offset, record))
            chunks.append((shard, record))
        for shard in sorted({shard for shard, _ in chunks}):
            self._detach(shard)
            with (self.folder / shard).open("ab") as file:
                file.write(b"".join(record for name, record in chunks if name == shard))
                file.flush()
                os.fsync(file.fileno())
        self._rows += rows
        self._ids |= {row["image_id"] for row in rows}
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(rows) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def publish(self, destination: Path) -> LatentStore:
        """Make the store in `destination` (other files in it stay, old shards go).

        Shards are hard links where the file system allows, so nothing is held twice. The index
        comes last: a kill leaves either no index or a whole store.
        """
        destination.mkdir(parents=True, exist_ok=True)
        (destination / INDEX_FILE).unlink(missing_ok=True)
        for old in destination.glob("*.bin"):
            old.unlink()
        for shard in sorted(self._sizes):
            temporary = destination / f".{shard}"
            temporary.unlink(missing_ok=True)
            try:
                os.link(self.folder / shard, temporary)
            except OSError:
                shutil.copyfile(self.folder / shard, temporary)
            os.replace(temporary, destination / shard)
        index = pd.DataFrame(self._rows, columns=list(INDEX_COLUMNS))
        temporary = destination / f".{INDEX_FILE}"
        index.to_parquet(temporary, index=False)
        os.replace(temporary, destination / INDEX_FILE)
        return LatentStore(destination)

    def _place(self, bucket_hw: tuple[int, int], nbytes: int) -> tuple[str, int]:
        """Reserve room: (shard, offset)."""
        bucket = f"{bucket_hw[0]}x{bucket_hw[1]}"
        number = self._open.setdefault(bucket, 0)
        used = self._sizes.get(shard := f"{bucket}-{number:05d}.bin", 0)
        if used and used + nbytes > self._shard_bytes:
            self._open[bucket] = number + 1
            shard, used = f"{bucket}-{number + 1:05d}.bin", 0
        self._sizes[shard] = used + nbytes
        return shard, used

    def _detach(self, shard: str) -> None:
        """Break the hard link of a published shard, so that appending never alters the store."""
        path = self.folder / shard
        if path.exists() and path.stat().st_nlink > 1:
            temporary = self.folder / f".{shard}"
            shutil.copyfile(path, temporary)
            os.replace(temporary, path)

    def _row(
        self,
        image_id: str,
        split: str,
        bucket_hw: tuple[int, int],
        latent: Tensor,
        shard: str,
        offset: int,
        record: bytes,
    ) -> dict[str, Any]:
        channels, latent_h, latent_w = latent.shape
        return {
            "image_id": image_id,
            "split": split,
            "bucket": f"{bucket_hw[0]}x{bucket_hw[1]}",
            "height_px": bucket_hw[0],
            "width_px": bucket_hw[1],
            "latent_channels": channels,
            "latent_h": latent_h,
            "latent_w": latent_w,
            "dtype": self.dtype,
            "shard": shard,
            "offset": offset,
            "nbytes": len(record),
            "xxh64": xxhash.xxh64_hexdigest(record),
            "encoder_digest": self._encoder_digest,
        }

    def _resume(self) -> None:
        """Take over journalled batches; start afresh where the header or a shard does not fit."""
        lines = []
        if self._journal.exists():
            text = self._journal.read_text(encoding="utf-8")
            # A line without its newline was cut off by a kill.
            lines = text[: text.rfind("\n") + 1].splitlines()
        if lines and json.loads(lines[0]) == self._header:
            for line in lines[1:]:
                self._take_over(json.loads(line))
        if not self._rows or any(self._length(name) < size for name, size in self._sizes.items()):
            lines = [json.dumps(self._header)]
            self._rows, self._ids, self._sizes, self._open = [], set(), {}, {}
        for shard in self.folder.glob("*.bin"):
            if shard.name not in self._sizes:
                shard.unlink()
            elif shard.stat().st_size > self._sizes[shard.name]:
                os.truncate(shard, self._sizes[shard.name])
        write_atomically(self._journal, "".join(f"{line}\n" for line in lines).encode())

    def _take_over(self, batch: list[dict[str, Any]]) -> None:
        for row in batch:
            self._rows.append(row)
            self._ids.add(row["image_id"])
            self._sizes[row["shard"]] = row["offset"] + row["nbytes"]
            number = int(row["shard"].removesuffix(".bin").rpartition("-")[2])
            self._open[row["bucket"]] = max(number, self._open.get(row["bucket"], 0))

    def _length(self, shard: str) -> int:
        path = self.folder / shard
        return path.stat().st_size if path.exists() else 0
