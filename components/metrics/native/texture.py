"""Weight-free numbers of one image: detail, entropy, flat area, sharpness, colourfulness.

They need no reference and no model, see native pixels, and none of them tells texture from
noise; the report therefore shows them beside the same numbers of real photographs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from components.images.arrays import ImageArray
from components.signals.appearance import laplacian_variance, opponent_colours
from components.signals.compression import jpeg95_ratio
from components.signals.entropy import entropy_bits
from components.signals.flat_regions import flat_fraction, grayscale
from components.signals.glcm import glcm_measures

FLAT_PATCH_PX = 240
"""The corpus rule's patch; smaller images have no flat fraction."""
TEXTURE_IDS = (
    *("glcm_score", "compression_ratio", "entropy_bits", "flat_fraction"),
    *("laplacian_variance", "colourfulness"),
)
"""What `texture_metrics` yields, in its order."""


def colourfulness(rgb: ImageArray) -> float:
    """Hasler and Süsstrunk 2003: spread plus 0.3 times the mean of the opponent colours.

    Args:
        rgb: uint8 (H, W, 3).

    Returns:
        0 for a grey image; about 15 to 110 for photographs.
    """
    colours = opponent_colours(rgb)
    # hypot of roots, not one root of the sum: the last digit of scores on record.
    spread = math.hypot(
        math.sqrt(colours.red_green_variance), math.sqrt(colours.yellow_blue_variance)
    )
    return spread + 0.3 * math.hypot(colours.red_green_mean, colours.yellow_blue_mean)


def set_compression_ratio(ratios_and_pixels: Iterable[tuple[float, int]]) -> float:
    """Compression ratio of a set as Diffusion-4K reports it: sum of raw over sum of JPEG bytes.

    Args:
        ratios_and_pixels: (raw / JPEG bytes, height * width) of every image.
    """
    pairs = list(ratios_and_pixels)
    raw = sum(3.0 * pixels for _, pixels in pairs)
    # Back from each ratio to its bytes, because the set's number is sum over sum.
    compressed = sum(3.0 * pixels / ratio for ratio, pixels in pairs)
    # No pairs: a ratio of nothing.
    if compressed <= 0.0:
        raise ValueError("a set compression ratio needs at least one image")
    return raw / compressed


def texture_metrics(rgb: ImageArray) -> dict[str, float | None]:
    """Every weight-free metric of one image, by the ids of `components.metrics.cards`.

    Args:
        rgb: uint8 (H, W, 3), native pixels.

    Returns:
        None where the image is too small for the metric (no full 64 px or 240 px patch).
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"rgb must be uint8 (H, W, 3), got {rgb.dtype} {rgb.shape}")
    gray = grayscale(rgb)
    glcm = glcm_measures(gray)
    has_patch = min(gray.shape) >= FLAT_PATCH_PX
    return {
        "glcm_score": None if glcm is None else glcm[0],
        # A set of one; for several pictures `set_compression_ratio` goes back to bytes.
        "compression_ratio": jpeg95_ratio([rgb]),
        "entropy_bits": entropy_bits(gray),
        # `flat_fraction` says 0.0 where no patch fits, which here would read as "all detail".
        "flat_fraction": flat_fraction(gray, patch_px=FLAT_PATCH_PX) if has_patch else None,
        "laplacian_variance": laplacian_variance(gray, borders=False),
        "colourfulness": colourfulness(rgb),
    }
