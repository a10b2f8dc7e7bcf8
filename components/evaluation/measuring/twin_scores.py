"""Whether a picture from a training caption is that caption's photograph.

Both are compared at 1/8 of the picture's size, where composition and colour decide and not the
detail that a small network cannot hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from components.generation.generation_list import read_generations
from components.generation.twins import LIST, TRAINED, TWINS
from components.images.aspect_buckets import Bucket, fit_to_bucket
from components.images.decoding import read_rgb
from components.images.original_lookup import Original, OriginalLookup
from components.metrics.native.fidelity import psnr_db
from components.settings.schema import Settings
from components.telemetry.progress import track

REDUCED = 8


@dataclass(frozen=True)
class Twin:
    """A picture in its photograph's own size."""

    image_id: str
    file: str
    """Below `data/generate/twins`."""
    psnr_db: float
    """Against its own photograph, both at 1/8 size."""
    is_nearest: bool
    """No other of the twins' photographs is as near, each cut to the picture's size."""


def reduced_psnr_db(first: Image.Image, second: Image.Image) -> float:
    """PSNR of two pictures of one size after averaging blocks of 8x8 pixels; inf where equal.

    Args:
        first: RGB, edges of at least 8 pixels.
        second: the same size.

    Raises:
        ValueError: sizes differ.
    """
    if first.size != second.size:
        raise ValueError(f"{first.size} and {second.size}: compare pictures of one size")
    # Asked of the sizes before: an edge of 63 and one of 64 reduce to the same.
    small = [np.asarray(one.convert("RGB").reduce(REDUCED)) for one in (first, second)]
    return psnr_db(*small)


def score_twins(
    pictures: Mapping[str, tuple[str, Image.Image]], photographs: Mapping[str, Image.Image]
) -> list[Twin]:
    """Compare every twin with all photographs.

    Args:
        pictures: (file, picture) by the id of the photograph whose caption it is from.
        photographs: whole photographs by id, those of all pictures at least.
    """
    found = []
    for image_id, (file, picture) in pictures.items():
        bucket = Bucket(picture.height, picture.width)
        values = {
            name: reduced_psnr_db(picture, fit_to_bucket(photograph, bucket))
            for name, photograph in photographs.items()
        }
        own = values.pop(image_id)
        found.append(Twin(image_id, file, own, all(own > other for other in values.values())))
    return found


def pipeline_twins(root: Path, settings: Settings) -> list[Twin]:
    """The twins that the stage `generate` made, beside the photographs of all of them.

    Args:
        root: repository root.
        settings: all settings.

    Raises:
        OriginalsMissing: a photograph is neither at its path nor in the image store.
    """
    # Only the first picture of each is in its photograph's own size.
    first: dict[str, str] = {}
    for row in read_generations(root / TWINS / LIST):
        first.setdefault(row["source_image_id"], row["file"])
    if not first:
        return []
    table = pd.read_parquet(root / TRAINED)
    rows = table[table["image_id"].isin(first)]
    photographs = {
        original.image_id: _reduced(original, settings)
        for original in track(OriginalLookup(root).find_all(rows), "read training photographs")
    }
    pictures = {}
    for image_id, file in first.items():
        with Image.open(root / TWINS / file) as picture:
            pictures[image_id] = (file, picture.convert("RGB"))
    return score_twins(pictures, photographs)


def _reduced(original: Original, settings: Settings) -> Image.Image:
    """A photograph no larger than comparing at the sizes of this run needs."""
    image = Image.fromarray(
        read_rgb(original, max_megapixels=settings.ingest.max_megapixels).pixels
    )
    # Twice the largest size, so that fitting still averages.
    target = 2 * max(max(size) for size in settings.generate.sizes)
    return image.reduce(max(1, min(image.size) // target))


def twin_metrics(twins: list[Twin]) -> dict[str, float]:
    """`twins`, `twins_recognised`, `twin_psnr_db_worst` and `twin_psnr_db_mean`; none without."""
    if not twins:
        return {}
    values = [twin.psnr_db for twin in twins]
    return {
        "twins": float(len(twins)),
        "twins_recognised": float(sum(twin.is_nearest for twin in twins)),
        "twin_psnr_db_worst": min(values),
        "twin_psnr_db_mean": float(np.mean(values)),
    }
