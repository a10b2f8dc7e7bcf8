"""Full-reference fidelity of a reconstruction: PSNR, SSIM, NMSE, all in float64.

Images are uint8 RGB (H, W, 3) as a viewer sees them: a reconstruction is clipped and rounded to
8 bits before it is measured, so the numbers hold for the file and not for the network output.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.ndimage import correlate1d

ImageArray = npt.NDArray[np.uint8]

_SSIM_SIGMA = 1.5
_SSIM_RADIUS = 5
_K1, _K2 = 0.01, 0.03
_PEAK = 255.0


def _check(reference: ImageArray, image: ImageArray) -> None:
    for name, array in (("reference", reference), ("image", image)):
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(
                f"{name} must be uint8 (H, W, 3), got {array.dtype} {tuple(array.shape)}"
            )
    if reference.shape != image.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {image.shape}")


def _squared_error_sum(reference: ImageArray, image: ImageArray) -> float:
    """Sum of squared differences; exact, because 8-bit squares add up in int64."""
    difference = reference.astype(np.int32) - image.astype(np.int32)
    return float(np.sum(difference * difference, dtype=np.int64))


def psnr_db(reference: ImageArray, image: ImageArray) -> float:
    """Peak signal-to-noise ratio 10 log10(255^2 / MSE) in dB over all pixels and channels.

    Args:
        reference: uint8 (H, W, 3).
        image: uint8 (H, W, 3).

    Returns:
        dB, higher is closer; infinite for identical images.
    """
    _check(reference, image)
    mse = _squared_error_sum(reference, image) / reference.size
    return math.inf if mse == 0.0 else 10.0 * math.log10(_PEAK * _PEAK / mse)


def nmse(reference: ImageArray, image: ImageArray) -> float:
    """Normalised mean squared error ||x - y||^2 / ||x||^2 with x in [0, 255].

    The papers print NMSE without a definition; this is the common one, and it does not change
    when both images are scaled by one factor. It is undefined for an all-black reference.

    Args:
        reference: x, uint8 (H, W, 3).
        image: y, uint8 (H, W, 3).

    Returns:
        0 for identical images, lower is closer; infinite for a black reference with any error.
    """
    _check(reference, image)
    energy = float(np.sum(np.square(reference.astype(np.int32)), dtype=np.int64))
    error = _squared_error_sum(reference, image)
    if energy == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / energy


def _gaussian_window() -> npt.NDArray[np.float64]:
    offsets = np.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1, dtype=np.float64)
    weights = np.exp(-0.5 * (offsets / _SSIM_SIGMA) ** 2)
    normalised: npt.NDArray[np.float64] = weights / weights.sum()
    return normalised


def ssim(reference: ImageArray, image: ImageArray) -> float:
    """Structural similarity (Wang et al. 2004), mean of the three channels.

    11x11 Gaussian window of sigma 1.5, K1 0.01, K2 0.03, dynamic range 255, population moments,
    windows that lie wholly inside the image only.

    Args:
        reference: uint8 (H, W, 3), both edges at least 11 px.
        image: uint8 (H, W, 3).

    Returns:
        At most 1 (identical); higher is closer.

    Raises:
        ValueError: wrong type or shape, or an edge below 11 px.
    """
    _check(reference, image)
    if min(reference.shape[:2]) < 2 * _SSIM_RADIUS + 1:
        raise ValueError(f"SSIM needs edges of at least 11 px, got {reference.shape[:2]}")
    return float(np.mean([_ssim_channel(reference[..., c], image[..., c]) for c in range(3)]))


def _ssim_channel(x_u8: ImageArray, y_u8: ImageArray) -> float:
    window = _gaussian_window()
    inside = (slice(_SSIM_RADIUS, -_SSIM_RADIUS),) * 2

    def smooth(array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        rows = correlate1d(array, window, axis=0)
        result: npt.NDArray[np.float64] = correlate1d(rows, window, axis=1)[inside]
        return result

    x, y = x_u8.astype(np.float64), y_u8.astype(np.float64)
    mean_x, mean_y = smooth(x), smooth(y)
    variance_x = smooth(x * x) - mean_x**2
    variance_y = smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * _PEAK) ** 2, (_K2 * _PEAK) ** 2
    luminance = (2.0 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2.0 * covariance + c2) / (variance_x + variance_y + c2)
    return float(np.mean(luminance * structure))
