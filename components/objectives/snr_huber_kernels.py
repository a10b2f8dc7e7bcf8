"""Compiled loop of the SNR-HW objective on a CPU: loss and slopes in one walk over the latents.

The expressions are those of `fused_snr_huber.loss_and_gradient`, two rows at a time while they are
in the cache. numba takes about half a second to import, so that only a function that computes
imports this module.
"""

from __future__ import annotations

import numba
import numpy as np

from components.files.kernel_cache import cached

# Sums of a row in vector lanes, products that add in one step; both within float32 rounding.
_LOOSER = {"reassoc", "nsz", "contract"}


@numba.njit(nogil=True, error_model="numpy", fastmath=_LOOSER)
def _coefficient(
    band: np.float32, curvature: np.float32, weight: np.float32
) -> tuple[np.float32, np.float32]:
    """(rho, weight R / s) of one Haar coefficient R, s = sqrt(1 + R^2 / c^2)."""
    one = np.float32(1)
    square = band * band
    root = np.sqrt(one + square * curvature)
    # One division for both quotients: R^2 / (1 + s) and R / s.
    both = one / (root * (root + one))
    return square * (both * root), band * (both * (root + one)) * weight


@numba.njit(nogil=True, error_model="numpy", fastmath=_LOOSER)
def _two_rows(
    low: np.ndarray,
    high: np.ndarray,
    curvature: np.float32,
    weights: np.ndarray,
    top: np.ndarray,
    below: np.ndarray,
) -> np.float32:
    """Weighted sum of rho over the 2x2 blocks of two rows, and W^T of the slopes.

    Args:
        low: (W,) float32, sum of the residual's two rows.
        high: (W,) float32, their difference.
        curvature: 1 / c^2.
        weights: (4,) float32 of ll, lh, hl, hh.
        top: (W,) float32, filled with the slopes of the first row.
        below: (W,) float32, with those of the second.
    """
    half = np.float32(0.5)
    first = second = third = fourth = np.float32(0)
    for block in range(low.size // 2):
        left, right = 2 * block, 2 * block + 1
        # The other 1/2 is W^T's, taken in with the weight.
        rho, ll = _coefficient((low[left] + low[right]) * half, curvature, weights[0] * half)
        first += rho
        rho, lh = _coefficient((high[left] + high[right]) * half, curvature, weights[1] * half)
        second += rho
        rho, hl = _coefficient((low[left] - low[right]) * half, curvature, weights[2] * half)
        third += rho
        rho, hh = _coefficient((high[left] - high[right]) * half, curvature, weights[3] * half)
        fourth += rho
        top[left] = (ll + hl) + (lh + hh)
        top[right] = (ll - hl) + (lh - hh)
        below[left] = (ll + hl) - (lh + hh)
        below[right] = (ll - hl) - (lh - hh)
    return first * weights[0] + second * weights[1] + third * weights[2] + fourth * weights[3]


@cached
@numba.njit(nogil=True, error_model="numpy")
def loss_and_slopes(
    velocity: np.ndarray,
    latents: np.ndarray,
    noise: np.ndarray,
    minus_t: np.ndarray,
    curvature: np.ndarray,
    weights: np.ndarray,
    scratch: np.ndarray,
    sums: np.ndarray,
    slopes: np.ndarray,
) -> None:
    """Sums of weighted pseudo-Huber residuals by plane, and W^T of their slopes.

    Args:
        velocity: (P, H, W) float32, H and W even; P planes, channels of samples.
        latents: the same shape.
        noise: the same shape.
        minus_t: (P,) float32, -t.
        curvature: (P,) float32, 1 / c(t)^2.
        weights: (4,) float32 of ll, lh, hl, hh.
        scratch: (2, W) float32.
        sums: (P,) float64, filled.
        slopes: (P, H, W) float32, filled.
    """
    planes, height, width = velocity.shape
    low, high = scratch[0], scratch[1]
    for plane in range(planes):
        total = np.float64(0)
        factor = minus_t[plane]
        for row in range(0, height, 2):
            top, below = velocity[plane, row], velocity[plane, row + 1]
            top_noise, below_noise = noise[plane, row], noise[plane, row + 1]
            top_latents, below_latents = latents[plane, row], latents[plane, row + 1]
            for x in range(width):
                above = (top[x] - top_noise[x] + top_latents[x]) * factor
                under = (below[x] - below_noise[x] + below_latents[x]) * factor
                low[x] = above + under
                high[x] = above - under
            total += _two_rows(
                low, high, curvature[plane], weights, slopes[plane, row], slopes[plane, row + 1]
            )
        sums[plane] = total
