"""Compiled loops of the signals pass: gray, histogram and Sobel sums; co-occurrence counts.

Written for the vectoriser: one-dimensional row slices, loops from 0, 32-bit arithmetic said
explicitly (numba widens small integers to 64 bits otherwise). No loop allocates. numba takes about
a second to import, so that only functions that compute import this module.
"""

from __future__ import annotations

import numba
import numpy as np

from components.signals.count_kernels import count_in_four
from components.signals.kernel_cache import cached

# Reassociation lets the float32 sum of roots use vector lanes; nothing else may change a value (no
# approximate reciprocal or root). `certain_distance` in fused_texture bounds what it costs.
_REASSOCIATE = {"reassoc", "nsz"}


@numba.njit(nogil=True, error_model="numpy")
def _gray_row(pixels: np.ndarray, gray: np.ndarray) -> None:
    """OpenCV's 8-bit gray of one row: pixels (3 W,) uint8 interleaved RGB, gray (W,) uint8."""
    for x in range(gray.size):
        red = np.int32(pixels[3 * x])
        green = np.int32(pixels[3 * x + 1])
        blue = np.int32(pixels[3 * x + 2])
        # The weights add up to 2^15: the sum stays below 2^23, and white stays 255.
        weighted = np.int32(9798 * red + 19235 * green + 3735 * blue + 16384)
        gray[x] = np.uint8(weighted >> 15)


@numba.njit(nogil=True, error_model="numpy")
def _vertical_row(
    above: np.ndarray, row: np.ndarray, below: np.ndarray, smooth: np.ndarray, slope: np.ndarray
) -> None:
    """Vertical halves of the separable 3x3 Sobel: (1, 2, 1) and (-1, 0, 1), exact in float32."""
    for x in range(row.size):
        # Once for the whole row of the image: patches differ at their left and right ends alone.
        top = np.float32(above[x])
        bottom = np.float32(below[x])
        middle = np.float32(row[x])
        smooth[x] = top + middle + middle + bottom
        slope[x] = bottom - top


@numba.njit(nogil=True, error_model="numpy", fastmath=_REASSOCIATE)
def _magnitude_row(smooth: np.ndarray, slope: np.ndarray) -> tuple[np.int32, np.float32]:
    """(sum of squares, exact; sum of roots, float32) over one patch row, mirrored at its ends.

    Gradients reach 1020 and their squares 2,080,800 < 2^24: float32 holds them exactly, and the
    vectoriser likes it better than mixed integers. The sum of squares is an int32.
    """
    width = smooth.size
    # REFLECT_101 makes the horizontal difference 0 at both ends and doubles the inner slope.
    first = np.float32(2) * (slope[0] + slope[1])
    last = np.float32(2) * (slope[width - 1] + slope[width - 2])
    squares = np.int32(first * first + last * last)
    roots = abs(first) + abs(last)
    smooth_left, smooth_right = smooth[: width - 2], smooth[2:]
    left, middle, right = slope[: width - 2], slope[1 : width - 1], slope[2:]
    for x in range(width - 2):
        across = smooth_right[x] - smooth_left[x]
        down = left[x] + middle[x] + middle[x] + right[x]
        square = across * across + down * down
        # int32 said twice: widened to 64 bits the sum would use half of the lanes.
        squares = np.int32(squares + np.int32(square))
        roots += np.sqrt(square)
    return squares, roots


@numba.njit(nogil=True, error_model="numpy")
def _add_row(row: np.ndarray, sums: np.ndarray) -> None:
    """Column sums in the type of `sums`: 16 bits hold 257 rows of bytes."""
    for x in range(row.size):
        sums[x] += row[x]


@numba.njit(nogil=True, error_model="numpy")
def _block_means(
    sums: np.ndarray, channels: int, factor: int, rows: int, means: np.ndarray
) -> None:
    """One row of block means from the column sums of `rows` rows; the sums are zero afterwards.

    Args:
        sums: (C W,) unsigned, channels interleaved.
        channels: C.
        factor: columns of a block; the last block has what is left.
        rows: that were added up.
        means: (C ceil(W / factor),) uint8, filled; halves rounded up.
    """
    width = sums.size // channels
    area = factor * rows
    # Multiplying by a rounded-up 2^40 / (2 area) is the exact division while 1024 area^2 fits.
    whole = width // factor if area <= 32768 else 0
    reciprocal = np.uint64(((1 << 40) + 2 * area - 1) // (2 * area))
    # The usual rounding of total / area, both doubled so that a half needs no fraction.
    half = np.uint64(area)
    for block in range(whole):
        first = block * factor * channels
        for channel in range(channels):
            total = np.uint32(0)
            for x in range(factor):
                total = np.uint32(total + sums[first + channels * x + channel])
            means[block * channels + channel] = np.uint8(
                ((np.uint64(total) << np.uint64(1)) + half) * reciprocal >> np.uint64(40)
            )
    # The partial block at the end, and all of them where the reciprocal is not exact.
    for block in range(whole, means.size // channels):
        left = block * factor
        right = min(left + factor, width)
        area = rows * (right - left)
        for channel in range(channels):
            rest = 0
            for x in range(left, right):
                rest += int(sums[channels * x + channel])
            means[block * channels + channel] = np.uint8((2 * rest + area) // (2 * area))
    # Callers add the next rows without clearing.
    sums[:] = 0


@cached
@numba.njit(nogil=True, error_model="numpy")
def box_means(
    source: np.ndarray, channels: int, factor: int, sums: np.ndarray, means: np.ndarray
) -> None:
    """Mean of every factor x factor block, halves rounded up; blocks at the ends may be partial.

    Args:
        source: (H, C W) uint8, channels interleaved.
        channels: C.
        factor: block edge, 1 to 257 with sums of 16 bits, to 4096 with 32.
        sums: (C W,) uint16 or uint32 zeros; zeros again afterwards.
        means: (ceil(H / factor), C ceil(W / factor)) uint8, filled.
    """
    height = source.shape[0]
    for block_row in range(means.shape[0]):
        top = block_row * factor
        bottom = min(top + factor, height)
        for y in range(top, bottom):
            _add_row(source[y], sums)
        _block_means(sums, channels, factor, bottom - top, means[block_row])


@cached
@numba.njit(nogil=True, error_model="numpy")
def gray_histogram_sobel(
    pixels: np.ndarray,
    gray: np.ndarray,
    patch_px: int,
    tables: np.ndarray,
    squares: np.ndarray,
    roots: np.ndarray,
    halves: np.ndarray,
    factor: int,
    sums: np.ndarray,
    means: np.ndarray,
) -> None:
    """All that entropy, flatness and the small picture need, band by band while it is in cache.

    Args:
        pixels: (H, 3 W) uint8, interleaved RGB.
        gray: (H, W) uint8, filled.
        patch_px: edge of a patch, 3 to `fused_texture.MAX_PATCH_PX`.
        tables: (4, 256) uint32 zeros; their sum becomes the histogram.
        squares: (H // patch_px, W // patch_px) int64 zeros; sums of squared Sobel magnitudes.
        roots: the same shape, float64 zeros; sums of magnitudes.
        halves: (2, W) float32 scratch.
        factor: of `box_means` over the pixels, 1 to 257; 0 for none.
        sums: of `box_means`, (3 W,) uint16 zeros.
        means: of `box_means`.
    """
    height = gray.shape[0]
    patch_rows, patch_columns = squares.shape
    smooth, slope = halves[0], halves[1]
    added = 0
    # One more than there are patches: rows below the last patch count for histogram and means.
    for band in range(patch_rows + 1):
        top = band * patch_px
        bottom = min(top + patch_px, height)
        for y in range(top, bottom):
            _gray_row(pixels[y], gray[y])
            count_in_four(gray[y], tables)
            if factor > 0:
                _add_row(pixels[y], sums)
                added += 1
                # Blocks do not follow bands: one may begin in this band and end in the next.
                if added == factor or y == height - 1:
                    _block_means(sums, 3, factor, added, means[y // factor])
                    added = 0
        if band == patch_rows:
            break
        # A second run over the band, since a row's gradient needs the gray of the row below it.
        for y in range(top, bottom):
            # REFLECT_101 inside the patch: row -1 is row 1, row P is row P - 2.
            above = gray[y - 1] if y > top else gray[top + 1]
            below = gray[y + 1] if y < bottom - 1 else gray[bottom - 2]
            _vertical_row(above, gray[y], below, smooth, slope)
            for column in range(patch_columns):
                left = column * patch_px
                right = left + patch_px
                row_squares, row_roots = _magnitude_row(smooth[left:right], slope[left:right])
                # 64 bits from here: 32 are enough for one row of a patch, not for all of them.
                squares[band, column] += row_squares
                roots[band, column] += row_roots
