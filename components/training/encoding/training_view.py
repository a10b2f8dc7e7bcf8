"""Exactly what training sees of photographs, as pictures: bucket crops and decoded latents.

At a prompt::

    views = TrainingViews(load_settings(Path("params.yaml")), Path())
    view = views.of_file(Path("holiday.jpg"))
    Image.fromarray(view.crop).save("seen.png")
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from components.images.arrays import ImageArray
from components.images.aspect_buckets import Bucket, buckets, nearest_bucket
from components.images.decoding import ImageHeader, image_bytes, read_header
from components.images.original_lookup import OriginalLookup
from components.images.pixel_range import to_pixels
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.loading.base_autoencoder import encoder_digest, load_base_autoencoder
from components.settings.schema import Settings
from components.training.encoding.latents import bucket_crop, decode
from components.training.stores.latent_store import LatentStore, LatentStoreIncomplete

LATENTS = "data/latents"
_UNTILED_EDGE_PX = 2048


@dataclass(frozen=True)
class TrainingView:
    """One photograph as training meets it."""

    name: str
    """File name."""
    image_id: str
    header: ImageHeader
    bucket: Bucket
    crop: ImageArray
    """(bucket.height, bucket.width, 3): what the encoder is given."""
    latent: ImageArray | None
    """Its latent through the base decoder; None: the store has none."""

    def described(self) -> str:
        """One line: what the file stores, and what became of it."""
        header = self.header
        stored = f"{header.stored_width}x{header.stored_height}"
        turned = "" if header.orientation == 1 else f", orientation {header.orientation}"
        alpha = ", alpha on white" if header.has_alpha else ""
        latent = "no latent" if self.latent is None else "latent decoded"
        notes = f" ({', '.join(header.notes)})" if header.notes else ""
        return (
            f"{self.name}: {stored} {header.format} {header.color_space}, {header.bit_depth} bits"
            f"{turned}{alpha} -> seen {header.width}x{header.height} -> "
            f"bucket {self.bucket.width}x{self.bucket.height}, {latent}{notes}"
        )


class _OneFile:
    """Bytes that were read once, hashed and decoded."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_bytes(self) -> bytes:
        return self._data


class TrainingViews:
    """Looks at photographs with a project's settings and its store of latents.

    Args:
        settings: buckets, the base autoencoder, the limit of megapixels.
        root: repository.
    """

    def __init__(self, settings: Settings, root: Path) -> None:
        self._settings = settings
        self._root = root
        self._buckets = buckets(settings.buckets)
        try:
            self._store: LatentStore | None = LatentStore(root / LATENTS)
        except LatentStoreIncomplete:
            self._store = None

    @functools.cached_property
    def _originals(self) -> OriginalLookup:
        return OriginalLookup(self._root)

    @functools.cached_property
    def _autoencoder(self) -> AutoencoderKLF16:
        settings = self._settings
        return load_base_autoencoder(
            settings.models.autoencoder, settings.project.seed, root=self._root
        )

    @functools.cached_property
    def _decodes(self) -> bool:
        """Whether the latents are of the autoencoder that the settings name."""
        assert self._store is not None
        digest = self._store.index["encoder_digest"]
        # Latents of another encoder decode to a picture too, only not to the one that training
        # sees.
        return bool(len(digest)) and digest.iloc[0] == encoder_digest(self._autoencoder)

    def of_file(self, path: Path) -> TrainingView:
        """A photograph that need not be in any manifest; its bucket is the nearest.

        Raises:
            ImageUndecodable: unreadable file or no pixels.
            ValueError: the store's latents are of another autoencoder.
        """
        data = image_bytes(path)
        return self._view(path.name, hashlib.sha256(data).hexdigest(), data, None)

    def of_row(self, row: pd.Series) -> TrainingView:
        """A row of a manifest (image_id, uri, bucket_height, bucket_width), by path or store.

        Raises:
            ImageUndecodable: the original cannot be read, or no pixels.
            ValueError: the store's latents are of another autoencoder.
        """
        original = self._originals.find_each(row.to_frame().T)[0]
        bucket = None
        if not pd.isna(row["bucket_height"]):
            bucket = Bucket(int(row["bucket_height"]), int(row["bucket_width"]))
        return self._view(original.name, row["image_id"], image_bytes(original), bucket)

    def _view(self, name: str, image_id: str, data: bytes, bucket: Bucket | None) -> TrainingView:
        limit = self._settings.ingest.max_megapixels
        header = read_header(data, max_megapixels=limit)
        bucket = bucket or nearest_bucket(header.height, header.width, self._buckets)
        crop = bucket_crop(_OneFile(data), bucket, limit)
        return TrainingView(name, image_id, header, bucket, crop, self._latent(image_id))

    def _latent(self, image_id: str) -> ImageArray | None:
        if self._store is None or image_id not in self._store:
            return None
        if not self._decodes:
            raise ValueError(
                f"{LATENTS} was made with another autoencoder than models.autoencoder; "
                "make it again with: ultraflux run --until latents"
            )
        latent = self._store.read(image_id)
        model = self._autoencoder
        # In tiles where a whole picture's activations would be gigabytes.
        model.use_tiling = max(latent.shape[-2:]) * model.spatial_compression > _UNTILED_EDGE_PX
        return to_pixels(decode(model, latent[None]))[0]


def random_rows(table: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Rows of usable photographs, each image once, in random order.

    Args:
        table: manifest with image_id, uri, integrity and kept.
        count: at most this many.
        seed: the same rows for the same seed and table.
    """
    usable = table[table["integrity"].eq("ok")].drop_duplicates("image_id")
    # Before selection nothing is kept yet, and every readable photograph may be looked at.
    if usable["kept"].notna().any():
        usable = usable[usable["kept"].eq(True)]
    order = np.random.default_rng(seed).permutation(len(usable))
    return usable.iloc[order[:count]]
