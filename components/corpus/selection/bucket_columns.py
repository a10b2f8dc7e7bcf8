"""The bucket columns of a manifest: every image's nearest training size."""

from __future__ import annotations

import numpy as np
import pandas as pd

from components.images.aspect_buckets import Bucket

# Rows whose distances to all buckets are in memory at once.
_CHUNK = 65_536


def _nearest(height: np.ndarray, width: np.ndarray, buckets: tuple[Bucket, ...]) -> np.ndarray:
    """Positions of the nearest buckets; equals `aspect_buckets.nearest_bucket` row by row."""
    # In logarithms 2:1 and 1:2 are equally far from a square.
    ratios = np.log([bucket.aspect_ratio for bucket in buckets])
    positions = np.empty(len(height), dtype=np.int64)
    for start in range(0, len(height), _CHUNK):
        rows = slice(start, start + _CHUNK)
        distance = np.abs(ratios - np.log(width[rows] / height[rows])[:, None])
        positions[rows] = distance.argmin(axis=1)
    return positions


def assign_buckets(table: pd.DataFrame, buckets: tuple[Bucket, ...]) -> pd.DataFrame:
    """Add the nearest bucket (by the logarithm of the aspect ratio) of every row of known size.

    Returns:
        a copy with bucket ("HxW"), bucket_height and bucket_width.
    """
    height = table["height"].astype(float).to_numpy()
    width = table["width"].astype(float).to_numpy()
    # A broken header has no size; such a row has no bucket, and `integrity` rejects it.
    known = (height >= 1) & (width >= 1)
    nearest = _nearest(np.floor(height[known]), np.floor(width[known]), buckets)
    names = np.full(len(table), None, dtype=object)
    names[known] = np.array([bucket.name for bucket in buckets], dtype=object)[nearest]
    sizes = np.full((2, len(table)), np.nan)
    sizes[0, known] = np.array([bucket.height for bucket in buckets])[nearest]
    sizes[1, known] = np.array([bucket.width for bucket in buckets])[nearest]
    return table.assign(
        bucket=pd.Series(names, table.index, dtype=object),
        bucket_height=sizes[0],
        bucket_width=sizes[1],
    )
