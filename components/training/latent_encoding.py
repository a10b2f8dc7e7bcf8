"""Encode a corpus with the base autoencoder into a latent store.

The plan (which images share a batch) is a pure function of the rows, so a run that was killed
continues with the same batches and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from components.corpus.decoding import MAX_MEGAPIXELS, ImageUndecodable, read_rgb
from components.corpus.original_lookup import Original, OriginalLookup
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.base_autoencoder import encoder_digest
from components.objectives.haar import BAND_NAMES, haar
from components.progress import track
from components.settings import LatentsSettings
from components.training.aspect_buckets import Bucket, fit_to_bucket
from components.training.latent_store import LatentStore, LatentStoreWriter
from components.training.pixel_range import to_model


@dataclass(frozen=True)
class EncodingItem:
    """One image to encode."""

    image_id: str
    split: str
    path: Path | Original
    bucket: Bucket


def encoding_items(rows: pd.DataFrame, root: Path) -> list[EncodingItem]:
    """Rows of the manifest as items, each image once, ordered by bucket and image id.

    Args:
        rows: columns image_id, split, uri, bucket_height, bucket_width.
        root: repository; see `OriginalLookup`.

    Raises:
        ValueError: an image appears with two splits, or an original is missing.
    """
    unique = rows.drop_duplicates(["image_id", "split"])
    repeated = unique.loc[unique["image_id"].duplicated(), "image_id"]
    if len(repeated):
        raise ValueError(
            f"image {repeated.iloc[0]} is in more than one split; make the slices again"
        )
    originals = OriginalLookup(root).find_all(unique)
    items = [
        EncodingItem(
            row["image_id"],
            row["split"],
            original,
            Bucket(int(row["bucket_height"]), int(row["bucket_width"])),
        )
        for row, original in zip(unique.to_dict("records"), originals, strict=True)
    ]
    return sorted(items, key=lambda item: (item.bucket, item.image_id))


def batches(items: Iterable[EncodingItem], batch_size: int) -> list[list[EncodingItem]]:
    """Consecutive batches that never mix buckets."""
    plan = []
    for _, group in groupby(items, key=lambda item: item.bucket):
        members = list(group)
        plan += [members[at : at + batch_size] for at in range(0, len(members), batch_size)]
    return plan


def plan_digest(plan: Sequence[Sequence[EncodingItem]]) -> str:
    """Sha256 of which images are encoded, at which size, in which batches."""
    content = [[(item.image_id, item.split, item.bucket.name) for item in part] for part in plan]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@torch.no_grad()
def encode(autoencoder: AutoencoderKLF16, images_BCHW: Tensor) -> Tensor:
    """Normalised latents (z - shift_factor) * scaling_factor of the posterior mode.

    Args:
        autoencoder: base autoencoder.
        images_BCHW: (B, 3, H, W) in [-1, 1], edges multiples of the spatial compression.

    Returns:
        (B, C, H/16, W/16) for F16, in the autoencoder's dtype.
    """
    mode: Tensor = autoencoder.encode(images_BCHW).latent_dist.mode()
    return (mode - (autoencoder.config.shift_factor or 0.0)) * autoencoder.config.scaling_factor


def load_image(item: EncodingItem, max_megapixels: float = MAX_MEGAPIXELS) -> Tensor:
    """The photograph resized to cover its bucket and cropped to it, (3, H, W) in [-1, 1]."""
    try:
        image = Image.fromarray(read_rgb(item.path, max_megapixels=max_megapixels).pixels)
    except ImageUndecodable as problem:
        raise ImageUndecodable(f"{item.path.name}: {problem}") from problem
    return to_model([np.asarray(fit_to_bucket(image, item.bucket))])[0]


def encode_corpus(
    items: Sequence[EncodingItem],
    autoencoder: AutoencoderKLF16,
    settings: LatentsSettings,
    *,
    work_dir: Path,
    destination: Path,
    device: str = "cpu",
    max_megapixels: float = MAX_MEGAPIXELS,
) -> LatentStore:
    """Encode all items and publish the store; continues where a killed run stopped.

    Args:
        items: from `encoding_items`.
        autoencoder: base autoencoder, evaluation mode.
        settings: batch size, stored dtype, shard size.
        work_dir: state of unfinished work, private to this corpus and these settings.
        destination: folder of the finished store.
        device: where the encoder runs.
        max_megapixels: bound on decoded photographs.

    Raises:
        ImageUndecodable: a photograph cannot be read.
    """
    autoencoder = autoencoder.to(device)
    plan = batches(items, settings.batch_size)
    writer = LatentStoreWriter(
        work_dir / plan_digest(plan)[:16],
        dtype=settings.dtype,
        shard_mb=settings.shard_mb,
        encoder_digest=encoder_digest(autoencoder),
    )
    stored = writer.stored()
    pending = [batch for batch in plan if batch[0].image_id not in stored]
    for batch in track(pending, "latents", total=len(plan), initial=len(plan) - len(pending)):
        images = torch.stack([load_image(item, max_megapixels) for item in batch]).to(device)
        bucket = batch[0].bucket
        latents = encode(autoencoder, images)
        members = [(item.image_id, item.split) for item in batch]
        writer.append((bucket.height, bucket.width), members, latents)
    return writer.publish(destination)


def band_energy_shares(store: LatentStore) -> pd.DataFrame:
    """Share of each Haar band in the energy of every latent.

    Returns:
        Columns image_id, split, bucket, ll, lh, hl, hh; shares in [0, 1] that sum to 1 a row.
    """
    rows = []
    for row in store.index.itertuples(index=False):
        energies = [float(b.double().square().sum()) for b in haar(store.read(str(row.image_id)))]
        total = sum(energies) or 1.0
        shares = {name: e / total for name, e in zip(BAND_NAMES, energies, strict=True)}
        rows.append({"image_id": row.image_id, "split": row.split, "bucket": row.bucket, **shares})
    return pd.DataFrame(rows, columns=["image_id", "split", "bucket", *BAND_NAMES])
