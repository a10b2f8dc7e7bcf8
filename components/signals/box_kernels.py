"""Compiled means of boxes: of blocks that shrink an image, and of windows that slide over one."""

from __future__ import annotations

import numba
import numpy as np

from components.files.kernel_cache import cached
from components.signals.integer_kernels import plus

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
    windows[:size] = 0
    # Four at a time: a quarter of the loads and stores of the windows.
    number = 0
    while number + 4 <= count:
        one, two = np.uint64(step * number), np.uint64(step * (number + 1))
        three, four = np.uint64(step * (number + 2)), np.uint64(step * (number + 3))
        for x in range(size):
            here = np.uint64(x)
            near = plus(sums[here + one], sums[here + two])
            far = plus(sums[here + three], sums[here + four])
            windows[x] = plus(windows[x], plus(near, far))
        number += 4
    while number < count:
        shift = np.uint64(step * number)
        for x in range(size):
            windows[x] = plus(windows[x], sums[np.uint64(x) + shift])
        number += 1


@numba.njit(nogil=True, error_model="numpy")
def block_means(sums: np.ndarray, channels: int, factor: int, rows: int, means: np.ndarray) -> None:
    """One row of block means from the column sums of `rows` rows.

    Args:
        sums: (3, C W) unsigned, channels interleaved; the first row holds the column sums, the
            others are scratch.
        channels: C.
        factor: columns of a block; the last block has what is left.
        rows: that were added up.
        means: (C ceil(W / factor),) uint8, filled; halves rounded up.
    """
    columns, windows, totals = sums[0], sums[1], sums[2]
    width = columns.size // channels
    area = factor * rows
    whole = width // factor if area <= _AREA_IN_16_BITS else 0
    if whole > 0:
        _window_sums(columns, channels, factor, windows)
        for channel in range(channels):
            for block in range(whole):
                target = np.uint64(block * channels + channel)
                totals[target] = windows[np.uint64(block * channels * factor + channel)]
        # Rounded to the nearest is (total + area // 2) // area. A half more changes no quotient and
        # keeps it 1 / 514 away from whole numbers, a hundred times what float32 may be off here.
        half, share = np.float32(area // 2 + 0.5), np.float32(1) / np.float32(area)
        for x in range(whole * channels):
            means[x] = np.uint8(np.int32((np.float32(totals[x]) + half) * share))
    # The partial block at the end, and all of them where 16 bits are not enough.
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
        sums: (3, C W) uint16 or uint32 scratch.
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
