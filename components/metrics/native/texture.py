"""Weight-free numbers of one image: detail, entropy, flat area, sharpness, colourfulness.

They need no reference and no model, see native pixels, and none of them tells texture from
noise; the report therefore shows them beside the same numbers of real photographs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from components.images.arrays import ImageArray
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


def laplacian_variance(gray: ImageArray) -> float:
    """Variance of the 4-neighbour Laplacian over the interior pixels (Pech-Pacheco et al. 2000).

    Args:
        gray: uint8 (H, W), both edges at least 3 px.
    """
    if gray.ndim != 2 or min(gray.shape) < 3:
        raise ValueError(f"gray must be (H, W) with edges of at least 3 px, got {gray.shape}")
    g = gray.astype(np.int32)
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    return float(np.var(laplacian, dtype=np.float64))


def colourfulness(rgb: ImageArray) -> float:
    """Hasler and Süsstrunk 2003: spread plus 0.3 times the mean of the opponent colours.

    Args:
        rgb: uint8 (H, W, 3).

    Returns:
        0 for a grey image; about 15 to 110 for photographs.
    """
    channels = rgb.astype(np.int32)
    red, green, blue = channels[..., 0], channels[..., 1], channels[..., 2]
    red_green = (red - green).astype(np.float64)
    yellow_blue = 0.5 * (red + green) - blue
    spread = math.hypot(float(red_green.std()), float(yellow_blue.std()))
    centre = math.hypot(float(red_green.mean()), float(yellow_blue.mean()))
    return spread + 0.3 * centre


def set_compression_ratio(ratios_and_pixels: Iterable[tuple[float, int]]) -> float:
    """Compression ratio of a set as Diffusion-4K reports it: sum of raw over sum of JPEG bytes.

    Args:
        ratios_and_pixels: (raw / JPEG bytes, height * width) of every image.
    """
    pairs = list(ratios_and_pixels)
    raw = sum(3.0 * pixels for _, pixels in pairs)
    compressed = sum(3.0 * pixels / ratio for ratio, pixels in pairs)
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
        "compression_ratio": jpeg95_ratio([rgb]),
        "entropy_bits": entropy_bits(gray),
        "flat_fraction": flat_fraction(gray, patch_px=FLAT_PATCH_PX) if has_patch else None,
        "laplacian_variance": laplacian_variance(gray),
        "colourfulness": colourfulness(rgb),
    }
