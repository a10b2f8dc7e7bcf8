"""Aspect-ratio buckets: the fixed image sizes that a multi-aspect corpus is trained at.

UltraFlux publishes two sets (supplement, "DiT Training" text and table 3). Every batch holds images
of one bucket, so every edge is a multiple of 32 pixels: 16 for the F16 autoencoder times 2 for the
transformer's patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from components.settings.models import BucketsSettings

EDGE_MULTIPLE_PX = 32
MIN_EDGE_PX = 64

# (height, width), landscape and square. Table 3 prints width x height, puts the last four landscape
# sizes under "Portrait" and the portrait mirrors of some under "Square"; the labels have slipped by
# one row, the sizes have not. Mirrors of all are added by `buckets`.
TABLE_SIZES: tuple[tuple[int, int], ...] = (
    (3072, 5440),
    (3264, 5184),
    (3328, 4992),
    (3520, 4736),
    (2880, 5824),
    (2688, 6272),
    (3008, 5568),
    (2624, 6336),
    (3008, 5632),
    (3648, 4608),
    (4096, 4096),
)
# The text names these as examples (16:9, 3:2 and the square); no further size of it is published.
TEXT_SIZES: tuple[tuple[int, int], ...] = ((2880, 5120), (3136, 4704), (3840, 3840))


@dataclass(frozen=True, order=True)
class Bucket:
    """One training size in pixels."""

    height: int
    width: int

    @property
    def name(self) -> str:
        """Height x width, such as "3072x5440"."""
        return f"{self.height}x{self.width}"

    @property
    def aspect_ratio(self) -> float:
        """Width over height."""
        return self.width / self.height


def _scaled(height: int, width: int, target_pixels: int) -> Bucket:
    """The size of about `target_pixels` with the aspect ratio of (height, width)."""
    scale = math.sqrt(target_pixels / (height * width))

    def snap(edge: int) -> int:
        multiple = math.floor(edge * scale / EDGE_MULTIPLE_PX + 0.5)
        return max(MIN_EDGE_PX, multiple * EDGE_MULTIPLE_PX)

    return Bucket(snap(height), snap(width))


def buckets(settings: BucketsSettings) -> tuple[Bucket, ...]:
    """The bucket set, portrait mirrors included, from widest to tallest.

    With `target_pixels` the published aspect ratios are kept at that area, as closely as edges that
    are multiples of 32 (at least 64) allow; sizes that become equal are listed once.

    Returns:
        distinct buckets in a fixed order: aspect ratio falling, then height rising.
    """
    published = TABLE_SIZES if settings.published == "table" else TEXT_SIZES
    sizes = {Bucket(height, width) for height, width in published}
    sizes |= {Bucket(width, height) for height, width in published}
    if settings.target_pixels is not None:
        sizes = {_scaled(size.height, size.width, settings.target_pixels) for size in sizes}
    return tuple(sorted(sizes, key=lambda size: (-size.aspect_ratio, size.height)))


def nearest_bucket(height: int, width: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose aspect ratio is nearest to width / height on a logarithmic scale.

    The logarithm makes 2:1 and 1:2 equally far from 1:1. Of equally near buckets the earlier wins.

    Raises:
        ValueError: an edge is not positive, or there is no bucket.
    """
    if height < 1 or width < 1:
        raise ValueError(f"image size {height}x{width}: both edges must be at least 1")
    if not buckets:
        raise ValueError("no buckets to choose from")
    log_ratio = math.log(width / height)
    return min(buckets, key=lambda bucket: abs(math.log(bucket.aspect_ratio) - log_ratio))


def fit_to_bucket(image: Image.Image, bucket: Bucket) -> Image.Image:
    """Resize an RGB image until it covers the bucket and keep the centre, in one resampling.

    Lanczos over the full-resolution pixels (no reducing gap: a box prefilter would soften detail).
    Only the part that is kept is computed, so a very long image costs no more than any other.

    Args:
        image: RGB, any size.
        bucket: target size.

    Returns:
        RGB image of exactly (bucket.height, bucket.width).

    Raises:
        ValueError: the image is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"image mode {image.mode}: expected RGB (decode with corpus.decoding)")
    scale = max(bucket.height / image.height, bucket.width / image.width)
    # The part of the source that covers the bucket exactly; min() guards against rounding.
    height = min(float(image.height), bucket.height / scale)
    width = min(float(image.width), bucket.width / scale)
    top = (image.height - height) / 2
    left = (image.width - width) / 2
    return image.resize(
        (bucket.width, bucket.height),
        Image.Resampling.LANCZOS,
        box=(left, top, left + width, top + height),
    )
