"""PDQ, a 256-bit perceptual hash of a photograph and its quality.

Source: Meta, "The TMK+PDQF video-hashing algorithm and the PDQ image-hashing algorithm", 2019.

Near duplicates are within a Hamming distance of 31. The quality, 0 to 100, says how much structure
the hash stands on; below 50 (blank and nearly blank images) hashes of different images collide.

Written here in the order of operations of the reference implementation (package `pdqhash`), which
takes five times as long; every bit and every quality is the same (tested).
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from components.signals.shrinking import box_reduced

_LONG_EDGE_PX = 512
"""The reference implementation hashes images of at most this size."""
_GRID = 64
"""The hash samples a 64x64 grid, so that no edge may be smaller."""
_FREQUENCIES = 16
_PASSES = 2
"""A box filter applied twice is a tent."""
_LEVELS = np.arange(256)
# In the reference's order and precision: float64 products, their sum in float32.
_LUMA = (_LEVELS * 0.299 + _LEVELS * 0.587 + _LEVELS * 0.114).astype(np.float32)
_DCT = np.array(
    [
        [
            float(np.float32(math.sqrt(2 / _GRID)))
            * math.cos(math.pi / 2 / _GRID * (row + 1) * (2 * column + 1))
            for column in range(_GRID)
        ]
        for row in range(_FREQUENCIES)
    ],
    np.float32,
)
"""Frequencies 1 to 16 of the DCT-II of 64 samples."""


def _blurred(luma: np.ndarray) -> np.ndarray:
    """(H, W) float32 through the reference's tent filter, about one cell of the grid wide."""
    # numba: a second that only processes pay which measure.
    from components.signals.box_kernels import sliding_means

    for _ in range(_PASSES):
        # Along the rows first. A filter down the columns works on whole rows at once, so that both
        # directions are one, of the picture and of its transpose.
        for _ in range(2):
            luma = cv2.transpose(luma)
            means = np.empty_like(luma)
            window = -(-luma.shape[0] // (2 * _GRID))
            sliding_means(luma, window, np.empty(luma.shape[1], np.float32), means)
            luma = means
    return luma


def _sampled(luma: np.ndarray) -> np.ndarray:
    """(64, 64) float32: the pixel at the centre of each cell of the grid."""
    if luma.shape == (_GRID, _GRID):
        return luma
    rows, columns = (
        ((np.arange(_GRID) + 0.5) * edge / _GRID).astype(np.int64) for edge in luma.shape
    )
    return _blurred(luma)[np.ix_(rows, columns)]


def _quality(grid: np.ndarray) -> int:
    """0 to 100: the sum of whole hundredths of white between neighbours of the grid, over 90."""
    total = 0
    for axis in (0, 1):
        steps = -np.diff(grid, axis=axis) * np.float32(100) / np.float32(255)
        total += int(np.abs(steps.astype(np.int32)).sum())
    return min(total // 90, 100)


def _spectrum(grid: np.ndarray) -> np.ndarray:
    """(16, 16) float32: DCT of the grid; sums in float32, one sample after another."""
    # Sums over the slowest axis of products in C order, which numpy adds one after another; along
    # the fastest it would add in pairs, and a matrix product in any order.
    half = np.multiply(_DCT.T[:, :, None], grid[:, None, :], order="C").sum(axis=0)
    products = np.multiply(half.T[:, :, None], _DCT.T[:, None, :], order="C")
    return np.asarray(products.sum(axis=0))


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
    if min(height, width) < _GRID:
        return None
    scale = _LONG_EDGE_PX / max(height, width)
    if scale < 1:
        # (width, height), as OpenCV wants it.
        size = [max(_GRID, round(edge * scale)) for edge in (width, height)]
        # Whole blocks first; the short edge of a very long image keeps its 64 samples.
        factor = min(width // size[0], height // size[1])
        gray = cv2.resize(box_reduced(gray, factor), size, interpolation=cv2.INTER_AREA)
    grid = _sampled(_LUMA[gray])
    spectrum = _spectrum(grid)
    # The lower of the two middle values.
    median = np.sort(spectrum, axis=None)[spectrum.size // 2 - 1]
    # The first bit is that of the highest frequency.
    bits = (spectrum > median).ravel()[::-1]
    return np.packbits(bits).tobytes().hex(), _quality(grid)
