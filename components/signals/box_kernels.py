"""Compiled means of boxes: of blocks that shrink an image, and of windows that slide over one."""

from __future__ import annotations

import numba
import numpy as np

from components.signals.kernel_cache import cached

_AREA_IN_16_BITS = 257
"""Pixels of a block whose sum fits into 16 bits: 257 * 255 = 65535."""


@numba.njit(nogil=True, error_model="numpy")
def column_sums(rows: np.ndarray, top: int, bottom: int, sums: np.ndarray) -> None:
    """Sums of the columns of some rows, in the type of `sums`: 16 bits hold 257 rows of bytes.

    Args:
        rows: (H, n) uint8.
        top: first row.
        bottom: after the last.
        sums: (n,), filled.
    """
    # Unsigned positions: a negative one would count from the end, and every access would ask.
    y = np.uint64(top)
    if (bottom - top) % 2 == 1:
        for x in range(sums.size):
            sums[x] = rows[y, x]
        y += np.uint64(1)
    else:
        for x in range(sums.size):
            sums[x] = rows[y, x] + rows[y + np.uint64(1), x]
        y += np.uint64(2)
    while y < bottom:
        # Two at a time: half of the loads and stores of the sums.
        for x in range(sums.size):
            sums[x] += rows[y, x] + rows[y + np.uint64(1), x]
        y += np.uint64(2)


@numba.njit(nogil=True, error_model="numpy")
def _window_sums(sums: np.ndarray, step: int, count: int, windows: np.ndarray) -> None:
    """`windows[x] = sums[x] + sums[x + step] + ...`, `count` of them, wherever all of them exist.

    Neighbouring windows share most of their work; only every count-th is needed, but a vector of
    all costs less than those few one by one.
    """
    size = sums.size - step * (count - 1)
    for x in range(size):
        windows[x] = sums[x]
    for number in range(1, count):
        shift = np.uint64(step * number)
        for x in range(size):
            windows[x] += sums[np.uint64(x) + shift]


@numba.njit(nogil=True, error_model="numpy")
def block_means(sums: np.ndarray, channels: int, factor: int, rows: int, means: np.ndarray) -> None:
    """One row of block means from the column sums of `rows` rows.

    Args:
        sums: (2, C W) unsigned, channels interleaved; the first row holds the column sums, the
            second is scratch.
        channels: C.
        factor: columns of a block; the last block has what is left.
        rows: that were added up.
        means: (C ceil(W / factor),) uint8, filled; halves rounded up.
    """
    columns, windows = sums[0], sums[1]
    width = columns.size // channels
    area = factor * rows
    # Multiplying by a rounded-up 2^40 / (2 area) is the exact division while 1024 area^2 fits.
    whole = width // factor if area <= 32768 else 0
    reciprocal = np.uint64(((1 << 40) + 2 * area - 1) // (2 * area))
    # The usual rounding of total / area, both doubled so that a half needs no fraction.
    half = np.uint64(area)
    if area <= _AREA_IN_16_BITS and whole > 0:
        _window_sums(columns, channels, factor, windows)
        for block in range(whole):
            first = np.uint64(block * factor * channels)
            for channel in range(channels):
                total = np.uint64(windows[first + np.uint64(channel)])
                means[block * channels + channel] = np.uint8(
                    ((total << np.uint64(1)) + half) * reciprocal >> np.uint64(40)
                )
    else:
        for block in range(whole):
            first = np.uint64(block * factor * channels)
            for channel in range(channels):
                total = np.uint64(0)
                for x in range(factor):
                    total += np.uint64(columns[first + np.uint64(channels * x + channel)])
                means[block * channels + channel] = np.uint8(
                    ((total << np.uint64(1)) + half) * reciprocal >> np.uint64(40)
                )
    # The partial block at the end, and all of them where the reciprocal is not exact.
    for block in range(whole, means.size // channels):
        left = block * factor
        right = min(left + factor, width)
        area = rows * (right - left)
        for channel in range(channels):
            rest = 0
            for x in range(left, right):
                rest += int(columns[channels * x + channel])
            means[block * channels + channel] = np.uint8((2 * rest + area) // (2 * area))


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
        sums: (2, C W) uint16 or uint32 scratch.
        means: (ceil(H / factor), C ceil(W / factor)) uint8, filled.
    """
    height = source.shape[0]
    for block_row in range(means.shape[0]):
        top = block_row * factor
        bottom = min(top + factor, height)
        column_sums(source, top, bottom, sums[0])
        block_means(sums, channels, factor, bottom - top, means[block_row])


@cached
@numba.njit(nogil=True, error_model="numpy")
def sliding_means(source: np.ndarray, window: int, sums: np.ndarray, means: np.ndarray) -> None:
    """Mean of the rows within a window around each row; at the ends, of those that exist.

    float32 running sums that add the row that comes before they subtract the one that goes, as
    PDQ's reference implementation does: in another order the last bits would differ, and with them
    hashes.

    Args:
        source: (H, W) float32.
        window: rows, 1 to H; of an even number one more stands after the row than before it.
        sums: (W,) float32 scratch.
        means: (H, W) float32, filled.
    """
    height = source.shape[0]
    after = window // 2
    before = window - 1 - after
    sums[:] = np.float32(0)
    for y in range(min(after, height)):
        for x in range(sums.size):
            sums[x] += source[y, x]
    for y in range(height):
        first, last = y - before, y + after
        if last < height:
            for x in range(sums.size):
                sums[x] += source[last, x]
        if first > 0:
            for x in range(sums.size):
                sums[x] -= source[first - 1, x]
        rows = np.float32(min(last, height - 1) - max(first, 0) + 1)
        for x in range(sums.size):
            means[y, x] = sums[x] / rows
