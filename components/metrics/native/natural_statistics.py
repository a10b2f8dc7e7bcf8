"""Coefficients of natural scenes: the local normalisation that NIQE and PIQE rest on.

A photograph's brightness, less its local mean and over its local deviation, is nearly Gaussian
(Ruderman 1994); distortions change how far. Gray here is Y of YIQ, not OpenCV's gray.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from components.images.arrays import ImageArray

Plane = npt.NDArray[np.float64]

WINDOW_PX = 7
_SIGMA_PX = 7.0 / 6.0
# Rounded to float32, as pyiqa has them: a rounding decides an 8-bit level here and there.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32).astype(np.float64)


def _window() -> Plane:
    """(7, 7), sum 1; float32 values, for the same reason."""
    offsets = np.arange(WINDOW_PX) - WINDOW_PX // 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2.0 * _SIGMA_PX**2))
    return (weights / weights.sum()).astype(np.float32).astype(np.float64)


def luma(rgb: ImageArray) -> Plane:
    """Y of YIQ.

    Args:
        rgb: uint8 (H, W, 3).

    Returns:
        (H, W) float64, 0 to 1.
    """
    return (rgb / 255.0) @ _LUMA


def normalised(gray: Plane) -> Plane:
    """(x - local mean) / (local deviation + 1), borders replicated (Mittal et al. 2013, eq. 1).

    Args:
        gray: (H, W) float64, 0 to 255.
    """
    window = _window()

    def local(values: Plane) -> Plane:
        filtered = cv2.filter2D(values, cv2.CV_64F, window, borderType=cv2.BORDER_REPLICATE)
        return np.asarray(filtered, np.float64)

    mean = local(gray)
    # Rounding may leave a flat patch slightly below 0; released code takes the absolute value.
    variance = np.abs(local(gray**2) - mean**2)
    return (gray - mean) / (np.sqrt(variance + np.finfo(np.float64).eps) + 1.0)


def blocks(values: Plane, edge_px: int) -> Plane:
    """Full square blocks from the top left.

    Args:
        values: (H, W).
        edge_px: of a block; what is left over at the right and the bottom is dropped.

    Returns:
        (blocks, edge_px, edge_px), rows of blocks first.
    """
    rows, columns = (length // edge_px for length in values.shape)
    cut = values[: rows * edge_px, : columns * edge_px]
    # The swap brings each block's pixels together; reshaping alone would mix neighbours.
    tiled = cut.reshape(rows, edge_px, columns, edge_px).swapaxes(1, 2)
    return tiled.reshape(-1, edge_px, edge_px)
