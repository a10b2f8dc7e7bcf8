"""Sharpness and colour of a picture as single numbers; the corpus and the metrics share them."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from components.images.arrays import ImageArray


def laplacian_variance(gray: ImageArray, *, borders: bool) -> float:
    """Variance of the 4-neighbour Laplacian (Pech-Pacheco et al., ICPR 2000): 0 is flat.

    Args:
        gray: (H, W) uint8, both edges at least 3.
        borders: count the outermost pixels too, whose missing neighbours are reflected. The corpus
            does, as OpenCV's users do; the metrics look at complete neighbourhoods alone.
    """
    if gray.ndim != 2 or min(gray.shape) < 3:
        raise ValueError(f"gray must be (H, W) with edges of at least 3 px, got {gray.shape}")
    # Whole numbers in float64, so that nothing is rounded before the variance.
    laplacian = cv2.Laplacian(gray, cv2.CV_64F)
    # Contiguous, because numpy sums a view in another order, which is another last digit.
    return float((laplacian if borders else np.ascontiguousarray(laplacian[1:-1, 1:-1])).var())


class OpponentColours(NamedTuple):
    """Population variances and means of red - green and (red + green) / 2 - blue."""

    red_green_variance: float
    yellow_blue_variance: float
    red_green_mean: float
    yellow_blue_mean: float


def opponent_colours(rgb: ImageArray) -> OpponentColours:
    """What colourfulness (Hasler and Suesstrunk, SPIE 2003) is made of, in float64.

    Their M3 (eq. 8) is sqrt(sum of variances) + 0.3 sqrt(sum of squared means). The two that use it
    round its roots differently and keep doing so: scores on record stay what they are.

    Args:
        rgb: (H, W, 3) uint8.
    """
    # float64 first: uint8 differences would wrap around at 0.
    red, green, blue = np.moveaxis(rgb.astype(np.float64), -1, 0)
    red_green = red - green
    yellow_blue = (red + green) / 2 - blue
    return OpponentColours(
        float(red_green.var()),
        float(yellow_blue.var()),
        float(red_green.mean()),
        float(yellow_blue.mean()),
    )
