"""Training slices: who is held out, what the VAE sees, what each DiT stage sees."""

from __future__ import annotations

import hashlib
import math

import pandas as pd

from components.corpus.settings import SlicesSettings
from components.training.aspect_buckets import Bucket, nearest_bucket

SLICES = ("vae", "stage1", "stage2", "eval")


def _draw(seed: int, image_id: str) -> str:
    """A uniform draw that depends on seed and image alone, not on the other images."""
    return hashlib.sha256(f"{seed}:{image_id}".encode()).hexdigest()


def split(table: pd.DataFrame, settings: SlicesSettings, seed: int) -> pd.Series:
    """Hold images out for evaluation.

    Images are ordered by a hash of (seed, image_id) and the first eval_fraction of them, at least
    eval_min_images, are held out: adding a few photographs moves only those at the border.

    Args:
        table: manifest with image_id and kept.
        settings: shares and floors.
        seed: project seed.

    Returns:
        "train", "eval", or None for rows that are not kept.
    """
    kept = table.loc[table["kept"].eq(True), "image_id"]
    draws = kept.map(lambda image_id: _draw(seed, image_id)).sort_values()
    held_out = max(round(settings.eval_fraction * len(kept)), settings.eval_min_images)
    result = pd.Series(None, index=table.index, dtype=object)
    result[draws.index] = "train"
    result[draws.index[:held_out]] = "eval"
    return result


def assign_buckets(table: pd.DataFrame, buckets: tuple[Bucket, ...]) -> pd.DataFrame:
    """Add the nearest bucket of every row whose size is known.

    Returns:
        a copy with bucket ("HxW"), bucket_height and bucket_width.
    """
    sizes = table[["height", "width"]].astype(float).to_numpy()
    nearest = [
        nearest_bucket(int(height), int(width), buckets) if height > 0 and width > 0 else None
        for height, width in sizes
    ]
    return table.assign(
        bucket=pd.Series([b.name if b else None for b in nearest], table.index, dtype=object),
        bucket_height=pd.Series([b.height if b else None for b in nearest], table.index, float),
        bucket_width=pd.Series([b.width if b else None for b in nearest], table.index, float),
    )


def _top(rows: pd.DataFrame, column: str, ascending: bool, fraction: float, floor: int) -> pd.Index:
    """Index of the best `fraction` by `column`, at least `floor` rows; ties go by image_id."""
    count = max(math.ceil(fraction * len(rows)), floor)
    ranked = rows.sort_values([column, "image_id"], ascending=[ascending, True])
    return ranked.index[:count]


def slices(table: pd.DataFrame, settings: SlicesSettings) -> dict[str, pd.DataFrame]:
    """Cut the training and evaluation tables; rows stay in manifest order.

    vae: the share of the training images with the least flat area (paper: half). stage1: all
    training images. stage2: the top share by aesthetic score (SACL; paper: 5%). eval: held out.
    A floor above the number of images takes all there are.

    Args:
        table: manifest with split, flat_fraction and aesthetic.
        settings: shares and floors.
    """
    train = table[table["split"] == "train"]
    floor = settings.min_images
    detailed = _top(train, "flat_fraction", True, settings.vae_top_fraction, floor)
    beautiful = _top(train, "aesthetic", False, settings.stage2_top_fraction, floor)
    return {
        "vae": train[train.index.isin(detailed)],
        "stage1": train,
        "stage2": train[train.index.isin(beautiful)],
        "eval": table[table["split"] == "eval"],
    }
