"""NIQE: how far a picture's statistics are from those of undistorted photographs.

Mittal, Soundararajan and Bovik 2013. 36 features of every 96 px block at two scales are fitted by a
Gaussian, whose distance to the one fitted on photographs is the score; lower is better. The
parameters of the latter are a small file (`mu_prisparam`, `cov_prisparam`).

Deviation: the picture is halved in float64. pyiqa halves it in float32, which moves the fourth
digit; with its rounding taken away both agree (tests/components/metrics/native/test_niqe.py).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import gammaln

from components.images.arrays import ImageArray
from components.metrics.native.natural_statistics import Plane, blocks, luma, normalised

if TYPE_CHECKING:
    from components.metrics.metric import Picture


BLOCK_PX = 96
FEATURES = 36
# Neighbours whose products are looked at: right, below, and both diagonals (rows, columns).
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
# Cubic of MATLAB's imresize stretched by two: taps 2i - 3 to 2i + 4 of output i.
_TAP_DISTANCES = np.abs(np.arange(-3, 5) - 0.5) / 2.0


@cache
def _shapes() -> tuple[Plane, Plane]:
    """(exponents, E|x|^2 / E x^2 of a generalised Gaussian with each), both rising."""
    # The released grid: exponents come in steps of 0.001, and the score depends on them.
    exponents = np.arange(200, 10_001) / 1000.0
    ratios = np.exp(2 * gammaln(2 / exponents) - gammaln(1 / exponents) - gammaln(3 / exponents))
    return exponents, ratios


def asymmetric_gaussian(values: Plane) -> tuple[Plane, Plane, Plane]:
    """Moment fit of an asymmetric generalised Gaussian (Lasmar et al. 2009).

    Args:
        values: (N, h, w), a fit per entry.

    Returns:
        (exponent, left scale, right scale), each (N,); NaN where a side has no values.
    """
    exponents, ratios = _shapes()
    axes = (1, 2)
    # Zeros belong to neither side, as released.
    left, right = values < 0, values > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        left_rms = np.sqrt((values**2 * left).sum(axes) / left.sum(axes))
        right_rms = np.sqrt((values**2 * right).sum(axes) / right.sum(axes))
        skew = left_rms / right_rms
        ratio = np.abs(values).mean(axes) ** 2 / (values**2).mean(axes)
        ratio = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    # The nearest grid point by bisection, because ratios rise with the exponent; of two equally
    # near ones the first, as argmin would find.
    above = np.clip(np.searchsorted(ratios, ratio), 1, len(ratios) - 1)
    nearest = above - (ratio - ratios[above - 1] <= ratios[above] - ratio)
    exponent = exponents[nearest]
    to_scale = np.exp((gammaln(1 / exponent) - gammaln(3 / exponent)) / 2)
    return exponent, left_rms * to_scale, right_rms * to_scale


def block_features(values: Plane) -> Plane:
    """18 features per block: of its coefficients, and of the products of neighbours.

    Args:
        values: (N, h, w) normalised coefficients; neighbours wrap around inside a block.

    Returns:
        (N, 18) float64.
    """
    exponent, left, right = asymmetric_gaussian(values)
    features = [exponent, (left + right) / 2]
    for shift in _SHIFTS:
        products = values * np.roll(values, shift, axis=(1, 2))
        exponent, left, right = asymmetric_gaussian(products)
        mean = (right - left) * np.exp(gammaln(2 / exponent) - gammaln(1 / exponent))
        features += [exponent, mean, left, right]
    return np.stack(features, axis=1)


def halved(gray: Plane) -> Plane:
    """Half the size by MATLAB's antialiased bicubic, borders mirrored with the edge twice.

    Args:
        gray: (H, W), both even.
    """
    near, far = _TAP_DISTANCES <= 1, _TAP_DISTANCES > 1
    x = _TAP_DISTANCES
    # Keys' cubic with a = -0.5, on distances halved for antialiasing.
    weights = near * (1.5 * x**3 - 2.5 * x**2 + 1) + far * (-0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)
    weights = weights / weights.sum()

    def along_rows(values: Plane) -> Plane:
        count = values.shape[0]
        padded = np.pad(values, ((3, 3), (0, 0)), mode="symmetric")
        return sum(
            (weight * padded[tap : tap + count : 2] for tap, weight in enumerate(weights)),
            start=np.zeros((count // 2, values.shape[1])),
        )

    # Separable: rows, then the same on the transposed.
    return along_rows(along_rows(gray).T).T


def niqe(rgb: ImageArray, mean: Plane, covariance: Plane) -> float | None:
    """Distance to the statistics of photographs; None for fewer than two full blocks.

    Args:
        rgb: uint8 (H, W, 3).
        mean: (36,) of undistorted photographs.
        covariance: (36, 36).
    """
    rows, columns = (length // BLOCK_PX for length in rgb.shape[:2])
    if rows * columns < 2:
        return None
    # Cut to full blocks first, so that a block of the half scale is the same piece of picture.
    gray = np.rint(luma(rgb[: rows * BLOCK_PX, : columns * BLOCK_PX]) * 255.0)
    scales = ((gray, BLOCK_PX), (halved(gray), BLOCK_PX // 2))
    features = np.concatenate(
        [block_features(blocks(normalised(plane), edge)) for plane, edge in scales], axis=1
    )
    # A block without values on one side (a flat one) has no fit.
    whole = features[~np.isnan(features).any(axis=1)]
    if len(whole) < 2:
        return None
    # As released: the mean over what each feature has, the covariance over blocks that have all.
    difference = np.nanmean(features, axis=0) - mean
    # A pseudo-inverse: few blocks give a covariance of low rank.
    pooled = np.linalg.pinv((covariance + np.cov(whole, rowvar=False)) / 2)
    return float(np.sqrt(difference @ pooled @ difference))


def read_parameters(file: Path) -> tuple[Plane, Plane]:
    """(36,) mean and (36, 36) covariance of a published parameter file.

    Raises:
        ValueError: another file.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        values = loadmat(file)
        mean = np.asarray(values["mu_prisparam"], np.float64).ravel()
        covariance = np.asarray(values["cov_prisparam"], np.float64)
    except (MatReadError, KeyError, NotImplementedError, TypeError, ValueError) as problem:
        raise ValueError(f"{file}: not NIQE's parameters ({problem})") from None
    if mean.shape != (FEATURES,) or covariance.shape != (FEATURES, FEATURES):
        raise ValueError(f"{file}: mean {mean.shape} and covariance {covariance.shape}, not of 36")
    return mean, covariance


class NiqeMetric:
    """`metrics.ImageMetric` with a parameter file."""

    def __init__(self, file: Path, digest: str) -> None:
        """Read the parameters.

        Args:
            file: MATLAB file.
            digest: of the file.

        Raises:
            ValueError: another file.
        """
        self.ids = ("niqe",)
        self.weights_digest = digest
        self._mean, self._covariance = read_parameters(file)

    def measure(self, rgb: ImageArray, picture: Picture) -> dict[str, float | None]:
        """See `ImageMetric.measure`; the picture beyond its pixels is not used."""
        return {"niqe": niqe(rgb, self._mean, self._covariance)}
