"""Compiled loops of the signals pass: gray, histogram, Sobel sums and the small picture.

Written for the vectoriser: loops over whole rows from 0, integers no wider than what they hold,
unsigned positions (a negative one would count from the end, and every access would ask). No loop
allocates. numba takes about a second to import, so that only functions that compute import this
module.
"""

from __future__ import annotations

import numba
import numpy as np

from components.signals.box_kernels import block_means, column_sums
from components.signals.integer_kernels import count_in_four, minus, plus, shifted, times
from components.signals.kernel_cache import cached

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
def _squares_row(smooth: np.ndarray, slope: np.ndarray, left: int, patch_px: int) -> np.int32:
    """Sum of the squared gradients of one patch row, mirrored at its ends; exact.

    A square is at most 2,080,800, so that 32 bits hold a row of 1,024.
    """
    first = np.int32(2 * (slope[left] + slope[left + 1]))
    right = left + patch_px - 1
    # REFLECT_101 makes the horizontal difference 0 at both ends and doubles the inner slope.
    last = np.int32(2 * (slope[right] + slope[right - 1]))
    squares = np.int32(first * first + last * last)
    for x in range(patch_px - 2):
        here = np.uint64(left) + np.uint64(x)
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
    squares: int,
    flat_variance: float,
    smooth: np.ndarray,
    slope: np.ndarray,
) -> tuple[float, float]:
    """(variance of a patch's gradient magnitude, how far it may be off), no better than needed.

    The variance is E[m^2] - E[m]^2, and E[m^2] is known. Roots take as long as all else together,
    so they are taken of rows far apart first. Those of the rows that are left are, by the
    inequality of Cauchy and Schwarz, at most sqrt(their number * their squares), which are known:
    mostly a sixth of the rows shows that the variance is above the threshold, and then a lower
    bound of it comes back.

    Args:
        gray: (H, W) uint8.
        corner: top and left of the patch.
        squares: sum of its squared gradients.
        flat_variance: threshold.
        smooth: (P,) int16 scratch.
        slope: the same.
    """
    top, left = corner
    patch_px = smooth.size
    pixels = patch_px * patch_px
    mean_square = squares / pixels
    if mean_square < flat_variance - certain_distance(0.0, patch_px):
        # The variance is smaller still.
        return mean_square, 0.0
    squares_left = squares
    pixels_left = pixels
    roots = 0.0
    mean = 0.0
    for first in range(_ROWS_APART):
        for y in range(top + first, top + patch_px, _ROWS_APART):
            _vertical_row(gray, _mirrored(y, top, top + patch_px), left, smooth, slope)
            row_squares, row_roots = _roots_row(smooth, slope)
            squares_left -= int(row_squares)
            pixels_left -= patch_px
            roots += float(row_roots)
            mean = (roots + np.sqrt(np.float64(pixels_left) * squares_left)) / pixels
            distance = certain_distance(mean, patch_px)
            if mean_square - mean * mean > flat_variance + distance:
                return mean_square - mean * mean, distance
    return mean_square - mean * mean, certain_distance(mean, patch_px)


@cached
@numba.njit(nogil=True, error_model="numpy")
def gray_histogram_sobel(
    pixels: np.ndarray,
    gray: np.ndarray,
    flat_variance: float,
    halves: np.ndarray,
    patch_halves: np.ndarray,
    tables: np.ndarray,
    squares: np.ndarray,
    variances: np.ndarray,
    distances: np.ndarray,
    factor: int,
    sums: np.ndarray,
    means: np.ndarray,
) -> None:
    """All that entropy, flatness and the small picture need, row by row while it is in cache.

    Args:
        pixels: (H, 3 W) uint8, interleaved RGB.
        gray: (H, W) uint8, filled.
        flat_variance: which side of it a patch is on is what `variances` say.
        halves: (2, W) int16 scratch.
        patch_halves: (2, P) int16 scratch; P is the edge of a patch, 3 to
            `fused_texture.MAX_PATCH_PX`.
        tables: (4, 256) uint32 zeros; their sum becomes the histogram.
        squares: (H // P, W // P) int64 zeros; sums of squared Sobel magnitudes.
        variances: the same shape, float64, filled: of the magnitudes, or a bound on their side.
        distances: the same, filled: how far the variances may be off.
        factor: of `box_means` over the pixels, 1 to 257; 0 for none.
        sums: of `box_means`, (2, 3 W) uint16.
        means: of `box_means`.
    """
    height = gray.shape[0]
    patch_rows, patch_columns = squares.shape
    patch_px = patch_halves.shape[1]
    smooth, slope = halves[0], halves[1]
    patch_smooth, patch_slope = patch_halves[0], patch_halves[1]
    # One more than there are patches: rows below the last patch count for histogram and means.
    for band in range(patch_rows + 1):
        top = band * patch_px
        bottom = min(top + patch_px, height)
        for y in range(top, bottom):
            _gray_row(pixels[y], gray[y])
            count_in_four(gray[y], tables)
            # Blocks do not follow bands: one may begin in this band and end in the next.
            if factor > 0 and ((y + 1) % factor == 0 or y == height - 1):
                block = y // factor
                column_sums(pixels, block * factor, y + 1, sums[0])
                block_means(sums, 3, factor, y + 1 - block * factor, means[block])
            if band == patch_rows:
                continue
            # A row's gradient needs the gray of the row below it; the last one has none.
            for row in range(y - 1 if y > top else y, y if y < bottom - 1 else bottom):
                _vertical_row(gray, _mirrored(row, top, bottom), 0, smooth, slope)
                for column in range(patch_columns):
                    # 64 bits from here: 32 are enough for one row of a patch, not for all of them.
                    squares[band, column] += _squares_row(
                        smooth, slope, column * patch_px, patch_px
                    )
        if band == patch_rows:
            break
        for column in range(patch_columns):
            variances[band, column], distances[band, column] = _patch_variance(
                gray,
                (top, column * patch_px),
                squares[band, column],
                flat_variance,
                patch_smooth,
                patch_slope,
            )
