"""Latents of a corpus in fixed-record shards, one series of shards per aspect-ratio bucket.

Layout of a store folder: `index.parquet`, `store.json` (provenance of the encoder, photographs that
could not be encoded) and shards `<height>x<width>-<number>.bin`, raw little-endian records without
any framing. All records of a bucket have one size, so a shard is read by position. Latents are
stored normalised, (z - shift_factor) * scaling_factor: what the transformer sees. Captions and
their hashes stand in the text store, so that a new caption never encodes a photograph again.

Written by `LatentStoreWriter`, which appends to a work folder, survives a kill after any batch and
publishes the store at the end: the same bytes however often it was interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from components.training.stores.record_reader import Verify
from components.training.stores.record_store import RecordStore, StoreKind, StoreWriter
from components.training.stores.stored_tensors import StoreDtype, to_record

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
# Equal in all rows, so they are added once, when the index is made.
_ROW_COLUMNS = [name for name in INDEX_COLUMNS if name not in ("dtype", "encoder_digest")]


class LatentStoreIncomplete(RuntimeError):
    """The folder holds no finished store."""


class LatentCorrupt(RuntimeError):
    """A record whose bytes are not the ones that were written; names shard and image."""


KIND = StoreKind(
    name="latents",
    record="latent",
    stage="latents",
    version=2,
    columns=INDEX_COLUMNS,
    # The record hashes are among the columns, so the digest identifies every byte of the store.
    identity=INDEX_COLUMNS,
    incomplete=LatentStoreIncomplete,
    corrupt=LatentCorrupt,
    # Photographs are still there, so a shard can be made again; of captions the whole store is.
    remedy=", `ultraflux stores rebuild {shard}` encodes them again",
)


class LatentStore(RecordStore):
    """Read access by image id; every read is verified unless told otherwise.

    `index` has one row per image, columns `INDEX_COLUMNS`; `bucket` is "<height>x<width>" in
    pixels. `about` holds the `provenance` of the encoder and `rejected` photographs.
    """

    kind = KIND

    def __init__(self, folder: Path, *, verify: Verify = "always") -> None:
        """Open a finished store.

        Args:
            folder: of the store.
            verify: when record hashes are compared, as in `RecordReader`.

        Raises:
            LatentStoreIncomplete: no index (encoding has not finished), or another layout.
        """
        super().__init__(folder, verify=verify)
        columns = ["latent_channels", "latent_h", "latent_w"]
        # As one array, because looking up a row of a table costs more than reading a record's
        # place.
        self._shapes = self.index[columns].to_numpy(np.int64)

    @property
    def rejected(self) -> frozenset[str]:
        """Images that could not be encoded (within the limit of the settings)."""
        return frozenset(one["image_id"] for one in self.about["rejected"])

    def read(self, image_id: str) -> Tensor:
        """The normalised latent of one image.

        Returns:
            (C, h, w) float32 (stored bfloat16 is widened exactly).

        Raises:
            KeyError: the store has no such image.
            LatentCorrupt: the record is cut off or its hash differs.
        """
        return self.read_batch([image_id])[0]

    def read_batch(self, image_ids: Sequence[str]) -> Tensor:
        """Latents of images of one bucket, (B, C, h, w) float32, in the order asked for.

        Raises:
            KeyError: the store has no such image.
            LatentCorrupt: a record is cut off or its hash differs.
            ValueError: the images are of more than one shape.
        """
        # bfloat16 is the upper half of a float32: widening adds zeros and loses nothing.
        return self.read_stored(image_ids).float()

    def read_stored(
        self, image_ids: Sequence[str], out: Tensor | None = None, *, pin_memory: bool = False
    ) -> Tensor:
        """`read_batch` in the stored precision, straight from the disk into one tensor.

        Args:
            image_ids: B images of one shape.
            out: contiguous (B, C, h, w) of the stored precision to fill; None: a new one.
            pin_memory: page-lock the new tensor, so that its copy to a GPU does not block.

        Returns:
            (B, C, h, w); `out` where given.
        """
        rows = self._rows_of(image_ids)
        # Records of one bucket have one size and stack; the plan asks for nothing else.
        shapes = np.unique(self._shapes[rows], axis=0)
        if len(shapes) != 1:
            raise ValueError(f"a batch of latents of {len(shapes)} shapes; one bucket at a time")
        if out is None:
            shape = (len(rows), *(int(edge) for edge in shapes[0]))
            # One encoder run made the store, so the first record's precision is that of all.
            dtype = getattr(torch, str(self.index["dtype"].iloc[int(rows[0])]))
            out = torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
        self._read_into(rows, out)
        return out


class LatentStoreWriter:
    """Appends batches to shards in a work folder; `publish` turns them into a store."""

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
        self.dtype: StoreDtype = dtype
        self._writer = StoreWriter(
            KIND,
            folder,
            key="image_id",
            dtype=dtype,
            encoder_digest=encoder_digest,
            shard_mb=shard_mb,
        )

    def stored(self) -> frozenset[str]:
        """Ids of the images that are safely stored."""
        return self._writer.records.stored()

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
        # A NaN in the store would show as a loss that is NaN, weeks later.
        for (image_id, _), latent in zip(images, latents, strict=True):
            if not bool(torch.isfinite(latent).all()):
                raise ValueError(f"image {image_id}: its latent is not finite; check the encoder")
        self.append_records(
            bucket_hw,
            images,
            tuple(latents.shape[1:]),
            [to_record(latent, self.dtype) for latent in latents],
        )

    def append_records(
        self,
        bucket_hw: tuple[int, int],
        images: Sequence[tuple[str, str]],
        shape: tuple[int, ...],
        records: Sequence[bytes],
    ) -> None:
        """`append` for latents that are records already, all of `shape` (C, h, w)."""
        # The series of shards has the bucket's name, so records of one shard are all of one size.
        bucket = f"{bucket_hw[0]}x{bucket_hw[1]}"
        rows = [
            {
                "image_id": image_id,
                "split": split,
                "bucket": bucket,
                "height_px": bucket_hw[0],
                "width_px": bucket_hw[1],
                "latent_channels": shape[0],
                "latent_h": shape[1],
                "latent_w": shape[2],
            }
            for image_id, split in images
        ]
        self._writer.records.append(bucket, rows, records)

    def publish(
        self,
        destination: Path,
        provenance: Mapping[str, Any] | None = None,
        rejected: Mapping[str, str] | None = None,
    ) -> LatentStore:
        """Make the store in `destination`; see `RecordWriter.publish`.

        Args:
            destination: folder of the store.
            provenance: how the latents were made, JSON-able.
            rejected: reason by image id of what could not be encoded.
        """
        # With the columns said, an index without a single record has them too.
        index = pd.DataFrame(self._writer.records.rows, columns=_ROW_COLUMNS)
        self._writer.publish(destination, index, provenance, rejected)
        return LatentStore(destination)
