"""Flatness: the share of patches without texture (UltraFlux supplement 2.1).

A patch is flat when the variance of its Sobel gradient magnitude is below 800. Bit-exact with the
released filtering tool, from integer gradients instead of float64 ones.
"""

from __future__ import annotations

import cv2
import numpy as np

# The fast variance differs from the reference by less than 0.01 (float32 roots); within this
# distance of the threshold the reference decides.
_UNCERTAIN_VARIANCE = 0.5


def grayscale(pixels: np.ndarray) -> np.ndarray:
    """OpenCV's 8-bit gray, (9798 R + 19235 G + 3735 B + 2^14) >> 15.

    The weights are 0.299, 0.587 and 0.114 in 15-bit fixed point. A JPEG's own luma plane is not the
    same: flatness would change on a quarter of the images.

    Args:
        pixels: (H, W, 3) uint8, RGB.

    Returns:
        (H, W) uint8.
    """
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def sobel_variance(patch: np.ndarray) -> float:
    """Population variance of the 3x3 Sobel magnitude, float64, borders reflected inside the patch.

    The released tool's formula as it stands: it decides where the fast variant is too close.

    Args:
        patch: (h, w) uint8.
    """
    # OpenCV's default border is REFLECT_101. A numpy slice reaches it as an image of its own, so
    # nothing outside the patch is seen.
    gradient_x = cv2.Sobel(patch, cv2.CV_64F, 1, 0, ksize=3)
    gradient_y = cv2.Sobel(patch, cv2.CV_64F, 0, 1, ksize=3)
    return float(np.var(np.sqrt(gradient_x**2 + gradient_y**2)))


def _fast_sobel_variance(patch: np.ndarray) -> float:
    """E[m^2] - E[m]^2 with exact integer squares; the root is float32, the sums are exact."""
    # 16 bits hold a gradient of up to 1020, not its square.
    gradient_x = cv2.Sobel(patch, cv2.CV_16S, 1, 0, ksize=3).astype(np.int32)
    gradient_y = cv2.Sobel(patch, cv2.CV_16S, 0, 1, ksize=3).astype(np.int32)
    squares = gradient_x * gradient_x + gradient_y * gradient_y
    mean = np.sqrt(squares.astype(np.float32)).sum(dtype=np.float64) / squares.size
    return float(squares.sum(dtype=np.int64) / squares.size - mean * mean)


def _is_flat(patch: np.ndarray, flat_variance: float) -> bool:
    variance = _fast_sobel_variance(patch)
    if abs(variance - flat_variance) < _UNCERTAIN_VARIANCE:
        variance = sobel_variance(patch)
    # Strict, as the released tool compares.
    return variance < flat_variance


def flat_fraction(gray: np.ndarray, *, patch_px: int = 240, flat_variance: float = 800.0) -> float:
    """Share of flat patches among the full patches of a grid from the top left corner.

    Partial patches at the right and bottom are skipped; an image without a full patch gives 0.0,
    as the released tool does. The gradient of each patch sees nothing outside that patch.

    Args:
        gray: (H, W) uint8 from `grayscale`.
        patch_px: patch edge; paper: 240.
        flat_variance: strict upper bound of a flat patch's variance; paper: 800.

    Returns:
        0.0 to 1.0.
    """
    height, width = gray.shape
    corners = [
        (top, left)
        for top in range(0, height - patch_px + 1, patch_px)
        for left in range(0, width - patch_px + 1, patch_px)
    ]
    if not corners:
        return 0.0
    flat = sum(
        _is_flat(gray[top : top + patch_px, left : left + patch_px], flat_variance)
        for top, left in corners
    )
    return flat / len(corners)
