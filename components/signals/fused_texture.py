"""Gray, entropy, flat fraction and a small copy of an image in one pass over its pixels.

Bit-identical with `flat_regions` and the released tool (tested on every reference photograph): the
histogram and the sums of squared gradients are exact integers; only the sum of float32 roots is
not, its error is bounded, and a patch whose variance is not certain to lie on one side of the
threshold is decided by the slow exact formula. Most patches need few roots, or none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from components.images.scratch import Scratch
from components.signals.entropy import entropy_of_histogram
from components.signals.flat_regions import sobel_variance
from components.signals.shrinking import MAX_FACTOR_16_BITS, box_reduced

MAX_PATCH_PX = 1024
"""Squared gradients (up to 2 * 1020^2) of one patch row add up in 31 bits."""

_MIN_PATCH_PX = 3


@dataclass(frozen=True)
class FusedTexture:
    """What one pass over the pixels gives."""

    gray: np.ndarray
    """(H, W) uint8; scratch memory, valid until the next pass with the same scratch."""
    entropy_bits: float
    flat_fraction: float
    uncertain_patches: int
    """How many patches the exact formula decided."""
    reduced: np.ndarray
    """(ceil(H / f), ceil(W / f), 3) uint8: `shrinking.box_reduced` of the pixels."""


def fused_texture(
    pixels: np.ndarray,
    *,
    patch_px: int = 240,
    flat_variance: float = 800.0,
    reduced_by: int = 1,
    scratch: Scratch | None = None,
) -> FusedTexture:
    """Measure an image; semantics of `entropy.entropy_bits` and `flat_regions.flat_fraction`.

    Args:
        pixels: (H, W, 3) uint8, RGB.
        patch_px: patch edge, 3 to 1024; paper: 240.
        flat_variance: strict upper bound of a flat patch's variance; paper: 800.
        reduced_by: block edge f of the small copy; 1: `pixels` themselves.
        scratch: memory for the gray image (None: allocated).

    Raises:
        ValueError: no pixels, or a patch edge out of range.
    """
    if not _MIN_PATCH_PX <= patch_px <= MAX_PATCH_PX:
        raise ValueError(f"patch_px is {patch_px}: {_MIN_PATCH_PX} to {MAX_PATCH_PX} are possible")
    height, width, _ = pixels.shape
    # numba: a second that only processes pay which measure.
    from components.signals.integer_kernels import PAIR_TABLES
    from components.signals.texture_kernels import gray_histogram_sobel

    scratch = scratch or Scratch()
    # Whole words of eight levels.
    levels = scratch.take("gray", (-(-height * width // 8) * 8,))
    gray = levels[: height * width].reshape(height, width)
    pairs, counts = np.zeros(PAIR_TABLES, np.uint16), np.zeros(256, np.uint32)
    patches = (height // patch_px, width // patch_px)
    variances, distances = np.empty(patches), np.empty(patches)
    # Beyond it the pass's 16-bit column sums would overflow; `box_reduced` has wider ones.
    is_reduced_here = 1 < reduced_by <= MAX_FACTOR_16_BITS
    size = (-(-height // reduced_by), -(-width // reduced_by)) if is_reduced_here else (0, 0)
    means = np.empty((size[0], 3 * size[1]), np.uint8)
    gray_histogram_sobel(
        np.ascontiguousarray(pixels).reshape(height, 3 * width),
        levels,
        float(flat_variance),
        np.empty((2, patch_px), np.int16),
        pairs,
        counts,
        variances,
        distances,
        reduced_by if is_reduced_here else 0,
        np.empty((3, 3 * width if is_reduced_here else 0), np.uint16),
        means,
    )
    # The loop's float32 roots decide no patch that they could decide wrongly: within the bound of
    # their error the reference is asked, so that every verdict is the released tool's.
    uncertain = np.argwhere(np.abs(variances - flat_variance) <= distances).tolist()
    for row, column in uncertain:
        top, left = row * patch_px, column * patch_px
        patch = gray[top : top + patch_px, left : left + patch_px]
        variances[row, column] = sobel_variance(patch)
    flat = int((variances < flat_variance).sum())
    return FusedTexture(
        gray=gray,
        entropy_bits=entropy_of_histogram(counts.astype(np.int64)),
        flat_fraction=flat / variances.size if variances.size else 0.0,
        uncertain_patches=len(uncertain),
        reduced=means.reshape(*size, 3) if is_reduced_here else box_reduced(pixels, reduced_by),
    )
