"""One-level orthonormal 2D Haar transform of latents or images.

Shape legend: B batch, C channels, H height, W width. The first letter of a band names the filter
along the width, the second the filter along the height: `lh` is smooth from left to right and
changes from top to bottom.
"""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

Bands: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
BAND_NAMES = ("ll", "lh", "hl", "hh")


def require_even_size(latents_BCHW: Tensor) -> None:
    """Refuse what has no 2x2 blocks.

    Raises:
        ValueError: H or W is odd or zero, or there are none.
    """
    if latents_BCHW.ndim < 2:
        raise ValueError(
            f"latents: the Haar transform needs (..., H, W), got {tuple(latents_BCHW.shape)}"
        )
    height, width = latents_BCHW.shape[-2:]
    # Refused, not padded: a padded row would enter the loss as coefficients that no image has.
    if height % 2 or width % 2 or not height or not width:
        raise ValueError(
            f"latents: the Haar transform needs an even height and width, got {height}x{width}; "
            "crop or pad to even sizes"
        )


def haar(latents_BCHW: Tensor) -> Bands:
    """Split latents into four half-size bands, conserving energy (Parseval).

    For every 2x2 block (a b / c d): ll = (a+b+c+d)/2, lh = (a+b-c-d)/2, hl = (a-b+c-d)/2,
    hh = (a-b-c+d)/2. This is the J = 1 Haar transform of the SNR-HW objective (UltraFlux,
    supplement table 3).

    Args:
        latents_BCHW: (..., H, W) with even H and W, any floating dtype.

    Returns:
        (ll, lh, hl, hh), each (..., H/2, W/2) in the input's dtype.

    Raises:
        ValueError: H or W is odd or zero.
    """
    require_even_size(latents_BCHW)
    top, bottom = latents_BCHW[..., 0::2, :], latents_BCHW[..., 1::2, :]
    # Two one-dimensional steps need 8 additions a block instead of 12.
    low, high = top + bottom, top - bottom
    low_left, low_right = low[..., 0::2], low[..., 1::2]
    high_left, high_right = high[..., 0::2], high[..., 1::2]
    # Each one-dimensional step divides by sqrt 2, so both together by 2: orthonormal. That makes
    # energies of bands add up to that of the signal, and the inverse the transpose.
    return (
        (low_left + low_right) / 2,
        (high_left + high_right) / 2,
        (low_left - low_right) / 2,
        (high_left - high_right) / 2,
    )


def inverse_haar(bands: Bands) -> Tensor:
    """Rebuild the signal from its four bands; exact inverse (= transpose) of `haar`.

    Args:
        bands: (ll, lh, hl, hh), each (..., h, w).

    Returns:
        (..., 2h, 2w).
    """
    ll, lh, hl, hh = bands
    if not ll.shape == lh.shape == hl.shape == hh.shape:
        raise ValueError(f"bands: shapes differ, {[tuple(band.shape) for band in bands]}")
    out = ll.new_empty((*ll.shape[:-2], 2 * ll.shape[-2], 2 * ll.shape[-1]))
    # The transpose of a symmetric 4x4 matrix: the same signs as in `haar`, a, b, c, d by rows.
    out[..., 0::2, 0::2] = (ll + lh + hl + hh) / 2
    out[..., 0::2, 1::2] = (ll + lh - hl - hh) / 2
    out[..., 1::2, 0::2] = (ll - lh + hl - hh) / 2
    out[..., 1::2, 1::2] = (ll - lh - hl + hh) / 2
    return out
