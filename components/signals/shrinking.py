"""Shrinking a 4K image by a whole number: means of blocks, as PIL's `reduce` defines them.

Resampling filters for any ratio (PIL's, OpenCV's area filter) take nearly as long for one 4K image
as decoding it.
"""

from __future__ import annotations

import cv2
import numpy as np

MAX_FACTOR_16_BITS = 257
"""Column sums of so many rows of bytes fit into 16 bits: 257 * 255 = 65535."""


def box_reduced(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Mean of every factor x factor block; partial blocks at the right and bottom count too.

    Args:
        pixels: (H, W) or (H, W, C) uint8.
        factor: 1 gives `pixels` itself.

    Returns:
        (ceil(H / factor), ceil(W / factor)[, C]) uint8, halves rounded up.
    """
    if factor == 1:
        return pixels
    if factor == 2 and pixels.shape[0] % 2 == 0 and pixels.shape[1] % 2 == 0:
        # The one factor that OpenCV has vector code for; the same rounding.
        half = (pixels.shape[1] // 2, pixels.shape[0] // 2)
        return cv2.resize(pixels, half, interpolation=cv2.INTER_AREA)
    # numba: a second that only processes pay which measure.
    from components.signals.box_kernels import box_means

    height, width = pixels.shape[:2]
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    reduced = (-(-height // factor), -(-width // factor))
    means = np.empty((reduced[0], reduced[1] * channels), np.uint8)
    rows = np.ascontiguousarray(pixels).reshape(height, width * channels)
    kind = np.uint16 if factor <= MAX_FACTOR_16_BITS else np.uint32
    box_means(rows, channels, factor, np.empty((3, width * channels), kind), means)
    return means.reshape(*reduced, *pixels.shape[2:])
