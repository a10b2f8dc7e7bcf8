"""Shannon entropy of the gray-level histogram (UltraFlux supplement 2.1): reject below 7.0 bits."""

from __future__ import annotations

import math

import numpy as np

_ROWS_AT_ONCE = 256


def entropy_of_histogram(counts: np.ndarray) -> float:
    """H = -sum p log2 p over a histogram; bit-exact with the released filtering tool.

    The tool calls scipy's entropy with base 2 on the non-zero bins. These are its operations in its
    order (natural logarithm of the C library, numpy's summation, one division at the end): another
    order changes the last bits. Not scipy itself, whose import alone takes longer than hundreds of
    images and happens once per worker process.

    Args:
        counts: (256,) integers.

    Returns:
        0.0 (one level) to 8.0 (all levels equally frequent), bits.

    Raises:
        ValueError: no pixels.
    """
    total = int(counts.sum())
    if total == 0:
        raise ValueError("the histogram has no pixels")
    probabilities = counts[counts > 0] / total
    # math.log, not np.log: numpy's vector logarithm rounds differently in the last bit.
    terms = np.array([-p * math.log(p) for p in probabilities.tolist()])
    return float(terms.sum() / math.log(2))


def entropy_bits(gray: np.ndarray) -> float:
    """`entropy_of_histogram` of an image.

    Args:
        gray: (H, W) uint8, from `flat_regions.grayscale`.

    Raises:
        ValueError: no pixels.
    """
    if gray.size == 0:
        raise ValueError(f"gray image of shape {gray.shape} has no pixels")
    # Row blocks: bincount widens its input to int64, eight times the image.
    counts = np.zeros(256, np.int64)
    for top in range(0, gray.shape[0], _ROWS_AT_ONCE):
        counts += np.bincount(gray[top : top + _ROWS_AT_ONCE].ravel(), minlength=256)
    return entropy_of_histogram(counts)
