"""JPEG compression ratio, Diffusion-4K's measure of fine detail (lower means more detail)."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

JPEG_QUALITY = 95
# Said, not left to a default: the size depends on it.
_CHROMA_SUBSAMPLING = "4:2:0"


def jpeg95_bytes(pixels: np.ndarray) -> int:
    """Size in bytes of the image as a JPEG of quality 95 with 4:2:0 chroma.

    Args:
        pixels: (H, W, 3) uint8, RGB; edges up to 65,500 (the format's limit).

    Raises:
        ValueError: an edge too long for JPEG.
    """
    # libjpeg's own limit, below the 65535 that the format's 16 bits allow.
    if max(pixels.shape[:2]) > 65500:
        raise ValueError(f"{pixels.shape[0]}x{pixels.shape[1]}: JPEG edges end at 65500 pixels")
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=_CHROMA_SUBSAMPLING)
    return buffer.tell()


def jpeg95_ratio(images: Iterable[np.ndarray]) -> float:
    """Sum of raw bytes over sum of JPEG bytes of a set of images (Diffusion-4K section 3.2).

    A ratio of sums, not a mean of ratios: large images weigh more. One image is a set of one.

    Args:
        images: (H, W, 3) uint8 each, RGB.

    Raises:
        ValueError: no images.
    """
    raw = compressed = 0
    for pixels in images:
        raw += pixels.nbytes
        compressed += jpeg95_bytes(pixels)
    if compressed == 0:
        raise ValueError("no images: the compression ratio of an empty set is undefined")
    return raw / compressed
