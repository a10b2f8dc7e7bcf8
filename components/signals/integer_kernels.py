"""Compiled integer work that several kernels share: arithmetic that keeps its width, counting.

numba widens every sum of small integers to 64 bits, so that a vector of the processor holds a
quarter of the pixels; LLVM undoes that only where each value is used once. `plus`, `minus`, `times`
and `shifted` keep the width of their operands and wrap around: their callers say why nothing does.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic


def _narrow(instruction: str) -> Any:
    """An operation on two integers of one type with a result of that type."""

    def typed(context: Any, first: Any, second: Any) -> Any:
        # None: numba says that no such function is known for these two types.
        if first != second or not isinstance(first, numba.types.Integer):
            return None

        def emit(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
            return getattr(builder, instruction)(*operands)

        return first(first, second), emit

    return intrinsic(typed)


plus = _narrow("add")
minus = _narrow("sub")
times = _narrow("mul")
shifted = _narrow("lshr")
"""To the right, as an unsigned number."""


PAIR_TABLES = (2, 1 << 16)
"""Counters of 16 bits: 256 KiB, of which a photograph touches what lies near the diagonal."""
_MOST_WORDS = (1 << 15) - 1
"""Of eight levels, so that no counter passes 16 bits: a word adds at most 2 to it."""


@numba.njit(nogil=True, error_model="numpy")
def collect_pairs(pairs: np.ndarray, counts: np.ndarray) -> None:
    """Move what `count_levels` left in its tables to the histogram.

    Args:
        pairs: `PAIR_TABLES` uint16; zeros afterwards.
        counts: (256,) uint32.
    """
    for table in range(pairs.shape[0]):
        for second in range(256):
            row = pairs[table, 256 * second : 256 * second + 256]
            total = np.uint32(0)
            for first in range(256):
                count = np.uint32(row[first])
                counts[first] = plus(counts[first], count)
                total = plus(total, count)
                row[first] = np.uint16(0)
            counts[second] = plus(counts[second], total)


@numba.njit(nogil=True, error_model="numpy")
def count_levels(
    levels: np.ndarray,
    span: tuple[int, int],
    pending: int,
    pairs: np.ndarray,
    counts: np.ndarray,
) -> int:
    """Histogram of a stretch of bytes; neighbours are counted together, half as many increments.

    Equal neighbours go to two tables in turn, or each would wait for the one before.

    Args:
        levels: ((8 n),) uint8, contiguous.
        span: first and last + 1 of the stretch.
        pending: words that the tables hold: 0, or what the call before returned.
        pairs: `PAIR_TABLES` uint16, zeros at first; `collect_pairs` has the rest at the end.
        counts: (256,) uint32, grows.

    Returns:
        the new `pending`.
    """
    words = levels.view(np.uint64)
    position, last = span
    while position < last and (position % 8 != 0 or last - position < 8):
        counts[levels[position]] += np.uint32(1)
        position += 1
    low = np.uint64(0xFFFF)
    while last - position >= 8:
        if pending == _MOST_WORDS:
            collect_pairs(pairs, counts)
            pending = 0
        number = min((last - position) // 8, _MOST_WORDS - pending)
        first = position // 8
        for index in range(number):
            word = words[np.uint64(first) + np.uint64(index)]
            # An explicit uint16, or numba would add in 64 bits.
            pairs[0, word & low] += np.uint16(1)
            pairs[1, word >> np.uint64(16) & low] += np.uint16(1)
            pairs[0, word >> np.uint64(32) & low] += np.uint16(1)
            pairs[1, word >> np.uint64(48)] += np.uint16(1)
        pending += number
        position += 8 * number
    for rest in range(position, last):
        counts[levels[rest]] += np.uint32(1)
    return pending
