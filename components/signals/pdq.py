"""PDQ, a 256-bit perceptual hash of a photograph and its quality.

Source: Meta, "The TMK+PDQF video-hashing algorithm and the PDQ image-hashing algorithm", 2019.

Near duplicates are within a Hamming distance of 31. The quality, 0 to 100, says how much structure
the hash stands on; below 50 (blank and nearly blank images) hashes of different images collide.
"""

from __future__ import annotations

import cv2
import numpy as np

from components.signals.shrinking import box_reduced

_LONG_EDGE_PX = 512
"""The reference implementation hashes images of at most this size."""
_MIN_EDGE_PX = 64
"""The hash samples a 64x64 grid."""


def pdq(gray: np.ndarray) -> tuple[str, int] | None:
    """Hash and quality of an image, area-averaged to a long edge of 512 pixels first.

    The hash is one of luma, so it is taken of the gray image: a third of the work of RGB, and
    within rounding of it.

    Args:
        gray: (H, W) uint8, from `flat_regions.grayscale`.

    Returns:
        64 hexadecimal digits, first bit of the hash first, and 0 to 100; None when an edge is below
        64 pixels.
    """
    height, width = gray.shape
    if min(height, width) < _MIN_EDGE_PX:
        return None
    scale = _LONG_EDGE_PX / max(height, width)
    if scale < 1:
        # (width, height), as OpenCV wants it.
        size = [max(_MIN_EDGE_PX, round(edge * scale)) for edge in (width, height)]
        # Whole blocks first; the short edge of a very long image keeps its 64 samples.
        factor = min(width // size[0], height // size[1])
        gray = cv2.resize(box_reduced(gray, factor), size, interpolation=cv2.INTER_AREA)
    # Without a compiler for its extension everything but this function still works.
    import pdqhash

    bits, quality = pdqhash.compute(cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB))
    return np.packbits(bits.astype(np.uint8)).tobytes().hex(), int(quality)
