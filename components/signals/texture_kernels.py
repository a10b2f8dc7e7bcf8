"""Compiled loops of the signals pass: gray, histogram, Sobel sums and the small picture.

Written for the vectoriser: loops over whole rows from 0, integers no wider than what they hold,
unsigned positions (a negative one would count from the end, and every access would ask). No loop
allocates. numba takes about a second to import, so that only functions that compute import this
module.
"""

from __future__ import annotations

import numba
import numpy as np

from components.files.kernel_cache import cached
from components.signals.box_kernels import block_means, column_sums
from components.signals.integer_kernels import (
    collect_pairs,
    count_levels,
    minus,
    plus,
    shifted,
    times,
)

# Reassociation lets the float32 sum of roots use vector lanes; nothing else may change a value (no
# approximate reciprocal or root). `certain_distance` in fused_texture bounds what it costs.
_REASSOCIATE = {"reassoc", "nsz"}

_HALF_ULP = 2.0**-24
_ROWS_APART = 8


@numba.njit(nogil=True, error_model="numpy")
def certain_distance(mean_magnitude: float, patch_px: int) -> float:
    """How far from the threshold a variance E[m^2] - E[m]^2 must lie to be decided by.

    A row of n float32 roots is summed with n roundings of at most half an ulp, in whatever order,
    and each root has one more. So the mean magnitude m is off by a factor of at most 1 + e with
    e = (n + 1) 2^-24, and m^2 by m^2 (2 e + e^2). The last term covers the float64 arithmetic here
    and in the exact formula.

    Args:
        mean_magnitude: at least 0.
        patch_px: n.
    """
    relative = (patch_px + 1) * _HALF_ULP
    return mean_magnitude * mean_magnitude * (2 * relative + relative * relative) * 1.01 + 1e-6


@numba.njit(nogil=True, error_model="numpy")
def _gray_row(pixels: np.ndarray, gray: np.ndarray) -> None:
    """OpenCV's 8-bit gray of one row: pixels (3 W,) uint8 interleaved RGB, gray (W,) uint8.

    (9798 R + 19235 G + 3735 B + 2^14) >> 15 in 16 bits: every weight is 256 times its high byte and
    its low byte, and of the low bytes' sum only what carries into the high part counts.
    """
    for x in range(gray.size):
        red = np.uint16(pixels[3 * x])
        green = np.uint16(pixels[3 * x + 1])
        blue = np.uint16(pixels[3 * x + 2])
        # 9798 = 38 * 256 + 70, 19235 = 75 * 256 + 35, 3735 = 14 * 256 + 151, 2^14 = 64 * 256. At
        # most 127 * 255 + 64 above and 256 * 255 below.
        high = plus(times(red, np.uint16(38)), times(green, np.uint16(75)))
        high = plus(plus(high, times(blue, np.uint16(14))), np.uint16(64))
        low = plus(times(red, np.uint16(70)), times(green, np.uint16(35)))
        low = plus(low, times(blue, np.uint16(151)))
        gray[x] = np.uint8(shifted(plus(high, shifted(low, np.uint16(8))), np.uint16(7)))


@numba.njit(nogil=True, error_model="numpy")
def _vertical_row(
    gray: np.ndarray,
    rows: tuple[int, int, int],
    left: int,
    smooth: np.ndarray,
    slope: np.ndarray,
) -> None:
    """Vertical halves of the separable 3x3 Sobel: (1, 2, 1) and (-1, 0, 1), at most 1020.

    Args:
        gray: (H, W) uint8.
        rows: above, of and below the row in question.
        left: first column.
        smooth: (n,) int16, filled from n columns.
        slope: the same.
    """
    above, row, below = np.uint64(rows[0]), np.uint64(rows[1]), np.uint64(rows[2])
    for x in range(smooth.size):
        column = np.uint64(left) + np.uint64(x)
        top = np.int16(gray[above, column])
        bottom = np.int16(gray[below, column])
        middle = np.int16(gray[row, column])
        smooth[x] = plus(plus(top, bottom), plus(middle, middle))
        slope[x] = minus(bottom, top)


@numba.njit(nogil=True, error_model="numpy")
def _squares_row(smooth: np.ndarray, slope: np.ndarray) -> np.int32:
    """Sum of the squared gradients of one patch row, mirrored at its ends; exact.

    A square is at most 2,080,800, so that 32 bits hold a row of 1,024.
    """
    width = smooth.size
    # REFLECT_101 makes the horizontal difference 0 at both ends and doubles the inner slope.
    first = np.int32(2 * (slope[0] + slope[1]))
    last = np.int32(2 * (slope[width - 1] + slope[width - 2]))
    squares = np.int32(first * first + last * last)
    for x in range(width - 2):
        here = np.uint64(x)
        middle, after = here + np.uint64(1), here + np.uint64(2)
        across = np.int32(minus(smooth[after], smooth[here]))
        down = plus(slope[here], slope[after])
        down = np.int32(plus(down, plus(slope[middle], slope[middle])))
        squares = plus(squares, plus(times(across, across), times(down, down)))
    return squares


@numba.njit(nogil=True, error_model="numpy", fastmath=_REASSOCIATE)
def _roots_row(smooth: np.ndarray, slope: np.ndarray) -> tuple[np.int32, np.float32]:
    """(sum of squares, exact; sum of roots, float32) over one patch row, mirrored at its ends.

    Squares stay below 2^24, so that float32 holds them exactly.
    """
    width = smooth.size
    first = np.int32(2 * (slope[0] + slope[1]))
    last = np.int32(2 * (slope[width - 1] + slope[width - 2]))
    squares = np.int32(first * first + last * last)
    roots = np.float32(abs(first) + abs(last))
    for x in range(width - 2):
        here = np.uint64(x)
        middle, after = here + np.uint64(1), here + np.uint64(2)
        across = np.int32(minus(smooth[after], smooth[here]))
        down = plus(slope[here], slope[after])
        down = np.int32(plus(down, plus(slope[middle], slope[middle])))
        square = plus(times(across, across), times(down, down))
        squares = plus(squares, square)
        roots += np.sqrt(np.float32(square))
    return squares, roots


@numba.njit(nogil=True, error_model="numpy")
def _mirrored(y: int, top: int, bottom: int) -> tuple[int, int, int]:
    """Rows above, at and below y; REFLECT_101 inside a patch: row -1 is row 1, row P is row P - 2.

    A gradient sees nothing outside of its patch.
    """
    return (y - 1 if y > top else top + 1), y, (y + 1 if y < bottom - 1 else bottom - 2)


@numba.njit(nogil=True, error_model="numpy")
def _patch_variance(
    gray: np.ndarray,
    corner: tuple[int, int],
    flat_variance: float,
    smooth: np.ndarray,
    slope: np.ndarray,
) -> tuple[float, float]:
    """(variance of a patch's gradient magnitude, how far it may be off), no better than needed.

    Rows far apart come first. Of n measured pixels among N with variance v, the variance of all is
    at least v n / N (what the others add is not negative), and at most their mean square: mostly an
    eighth of the rows or two show that it is above the threshold, and in smooth patches the squares
    alone, without a root, that it is below. A bound on the right side is what comes back then.

    Args:
        gray: (H, W) uint8.
        corner: top and left of the patch.
        flat_variance: threshold.
        smooth: (P,) int16 scratch.
        slope: the same.
    """
    top, left = corner
    patch_px = smooth.size
    bottom = top + patch_px
    pixels = patch_px * patch_px
    # 64 bits from here: 32 are enough for one row of a patch, not for all of them.
    squares = 0
    measured = 0
    roots = 0.0
    variance, distance = 0.0, 0.0
    for first in range(_ROWS_APART):
        for y in range(top + first, bottom, _ROWS_APART):
            _vertical_row(gray, _mirrored(y, top, bottom), left, smooth, slope)
            row_squares, row_roots = _roots_row(smooth, slope)
            squares += int(row_squares)
            roots += float(row_roots)
            measured += patch_px
        mean = roots / measured
        variance = squares / measured - mean * mean
        distance = certain_distance(mean, patch_px)
        at_least = variance * measured / pixels
        if at_least > flat_variance + distance:
            return at_least, distance
        if first == 0 and squares < flat_variance * measured:
            all_squares = squares
            for y in range(top, bottom):
                if (y - top) % _ROWS_APART != 0:
                    _vertical_row(gray, _mirrored(y, top, bottom), left, smooth, slope)
                    all_squares += int(_squares_row(smooth, slope))
            mean_square = all_squares / pixels
            if mean_square < flat_variance - certain_distance(0.0, patch_px):
                return mean_square, 0.0
    return variance, distance


@cached
@numba.njit(nogil=True, error_model="numpy")
def gray_histogram_sobel(
    pixels: np.ndarray,
    levels: np.ndarray,
    flat_variance: float,
    halves: np.ndarray,
    pairs: np.ndarray,
    counts: np.ndarray,
    variances: np.ndarray,
    distances: np.ndarray,
    factor: int,
    sums: np.ndarray,
    means: np.ndarray,
) -> None:
    """All that entropy, flatness and the small picture need, row by row while it is in cache.

    Args:
        pixels: (H, 3 W) uint8, interleaved RGB.
        levels: (at least H W rounded up to 8,) uint8; its start is filled as (H, W).
        flat_variance: which side of it a patch is on is what `variances` say.
        halves: (2, P) int16 scratch; P is the edge of a patch, 3 to
            `fused_texture.MAX_PATCH_PX`.
        pairs: of `count_levels`; zeros, and zeros again afterwards.
        counts: (256,) uint32 zeros; become the histogram.
        variances: (H // P, W // P) float64, filled: of Sobel magnitudes, or a bound on their side.
        distances: the same, filled: how far the variances may be off.
        factor: of `box_means` over the pixels, 1 to 257; 0 for none.
        sums: of `box_means`, (3, 3 W) uint16.
        means: of `box_means`.
    """
    height, width = pixels.shape[0], pixels.shape[1] // 3
    gray = levels[: height * width].reshape(height, width)
    patch_rows, patch_columns = variances.shape
    patch_px = halves.shape[1]
    pending = 0
    # One more than there are patches: rows below the last patch count for histogram and means.
    for band in range(patch_rows + 1):
        top = band * patch_px
        for y in range(top, min(top + patch_px, height)):
            _gray_row(pixels[y], gray[y])
            pending = count_levels(levels, (y * width, (y + 1) * width), pending, pairs, counts)
            # Blocks do not follow bands: one may begin in this band and end in the next.
            if factor > 0 and ((y + 1) % factor == 0 or y == height - 1):
                block = y // factor
                column_sums(pixels, block * factor, y + 1, sums[0])
                block_means(sums, 3, factor, y + 1 - block * factor, means[block])
        if band == patch_rows:
            continue
        for column in range(patch_columns):
            variances[band, column], distances[band, column] = _patch_variance(
                gray, (top, column * patch_px), flat_variance, halves[0], halves[1]
            )
    collect_pairs(pairs, counts)
