"""Full-reference fidelity of a reconstruction: PSNR, SSIM, MS-SSIM, NMSE, all in float64.

Images are uint8 RGB (H, W, 3) as a viewer sees them: a reconstruction is clipped and rounded to
8 bits before it is measured, so the numbers hold for the file and not for the network output.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from components.images.arrays import ImageArray

Plane = npt.NDArray[Any]

_SSIM_SIGMA = 1.5
_SSIM_RADIUS = 5
_K1, _K2 = 0.01, 0.03
_PEAK = 255.0
SSIM_WINDOW_PX = 2 * _SSIM_RADIUS + 1
# Exponents of the five scales (Wang et al. 2003).
_MS_SSIM_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_MIN_PX = SSIM_WINDOW_PX * 2 ** (len(_MS_SSIM_EXPONENTS) - 1)
"""The window must fit into the smallest scale."""
_BAND_PX = 2**20
"""Pixels of one band: 8 MB an array. Smaller images are one band."""


def _check(reference: ImageArray, image: ImageArray) -> None:
    for name, array in (("reference", reference), ("image", image)):
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(
                f"{name} must be uint8 (H, W, 3), got {array.dtype} {tuple(array.shape)}"
            )
    if reference.shape != image.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {image.shape}")


def _squared_error_sum(reference: ImageArray, image: ImageArray) -> float:
    """Sum of squared differences, exact: it does not depend on the order of a machine's adds."""
    # In one pass without arrays of a wider type. Some builds of OpenCV square a root, which is off
    # by some 1e-16 of a sum of integers: the nearest integer is the sum up to 2^50.
    return float(round(cv2.norm(reference, image, cv2.NORM_L2SQR)))


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
    # Exact as in `_squared_error_sum`.
    energy = float(round(cv2.norm(reference, cv2.NORM_L2SQR)))
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
    windows that lie wholly inside the image only. Computed in bands of rows with a halo: the value
    of the whole image to 1e-12 (tested), in memory that does not grow with its height.

    Args:
        reference: uint8 (H, W, 3), both edges at least 11 px.
        image: uint8 (H, W, 3).

    Returns:
        At most 1 (identical); higher is closer.

    Raises:
        ValueError: wrong type or shape, or an edge below 11 px.
    """
    _check(reference, image)
    if min(reference.shape[:2]) < SSIM_WINDOW_PX:
        raise ValueError(f"SSIM needs edges of at least 11 px, got {reference.shape[:2]}")
    return float(np.mean([_similarity(reference[..., c], image[..., c])[0] for c in range(3)]))


def ms_ssim(reference: ImageArray, image: ImageArray) -> float:
    """Multi-scale structural similarity (Wang et al. 2003), mean of the three channels.

    Per channel: product over five scales of contrast-structure (at the last scale the whole SSIM),
    each averaged over its scale and raised to its exponent; negative means count as 0. Between
    scales 2x2 pixels are averaged and an odd last row or column is dropped.

    Args:
        reference: uint8 (H, W, 3), both edges at least 176 px.
        image: uint8 (H, W, 3).

    Raises:
        ValueError: wrong type or shape, or an edge below 176 px.
    """
    _check(reference, image)
    if min(reference.shape[:2]) < MS_SSIM_MIN_PX:
        raise ValueError(
            f"MS-SSIM needs edges of at least {MS_SSIM_MIN_PX} px, got {reference.shape[:2]}"
        )
    return float(np.mean([_ms_ssim_channel(reference[..., c], image[..., c]) for c in range(3)]))


def _ms_ssim_channel(reference: ImageArray, image: ImageArray) -> float:
    x: Plane = reference
    y: Plane = image
    product = 1.0
    for scale, exponent in enumerate(_MS_SSIM_EXPONENTS):
        if scale:
            x, y = _halved(x), _halved(y)
        # Luminance is compared at the last scale only, where it is the whole SSIM.
        similarity, contrast = _similarity(x, y)
        is_last = scale == len(_MS_SSIM_EXPONENTS) - 1
        # A negative mean has no real fractional power; the released code gives NaN there.
        product *= float(max(similarity if is_last else contrast, 0.0) ** exponent)
    return product


def _halved(plane: Plane) -> Plane:
    """Mean of 2x2 pixels, (h // 2, w // 2) float64."""
    # An odd row or column has no partner to be averaged with.
    even = plane[: plane.shape[0] // 2 * 2, : plane.shape[1] // 2 * 2]
    rows = np.add(even[::2], even[1::2], dtype=np.float64)
    halved: Plane = (rows[:, ::2] + rows[:, 1::2]) / 4.0
    return halved


def _similarity(x: Plane, y: Plane, band_px: int = _BAND_PX) -> tuple[float, float]:
    """Mean SSIM and mean contrast-structure of two planes (H, W), band by band."""
    rows = x.shape[0] - 2 * _SSIM_RADIUS
    step = max(1, band_px // x.shape[1])
    similarity: list[float] = []
    contrast: list[float] = []
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        band = slice(top, bottom + 2 * _SSIM_RADIUS)
        maps = _similarity_maps(x[band].astype(np.float64), y[band].astype(np.float64))
        # Bands differ in height: each counts by its rows, and fsum adds the shares exactly, so the
        # size of a band cannot move the mean.
        share = (bottom - top) / rows
        similarity.append(float(np.mean(maps[0])) * share)
        contrast.append(float(np.mean(maps[1])) * share)
    return math.fsum(similarity), math.fsum(contrast)


def _similarity_maps(x: Plane, y: Plane) -> tuple[Plane, Plane]:
    """SSIM and contrast-structure of every window, (H - 10, W - 10) float64."""
    # Here: it takes as long to import as PSNR takes for four pairs of 4096 x 4096.
    from scipy.ndimage import correlate1d

    window = _gaussian_window()
    # Windows that reach over the border are cut away, so the filter's rule there is never seen.
    inside = (slice(_SSIM_RADIUS, -_SSIM_RADIUS),) * 2

    def smooth(array: Plane) -> Plane:
        rows = correlate1d(array, window, axis=0)
        result: Plane = correlate1d(rows, window, axis=1)[inside]
        return result

    mean_x, mean_y = smooth(x), smooth(y)
    # Differences of nearly equal numbers where the picture is flat: float32 would lose all of their
    # digits at 255^2, and the constants C1 and C2 are small.
    variance_x = smooth(x * x) - mean_x**2
    variance_y = smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * _PEAK) ** 2, (_K2 * _PEAK) ** 2
    luminance = (2.0 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2.0 * covariance + c2) / (variance_x + variance_y + c2)
    return luminance * structure, structure
