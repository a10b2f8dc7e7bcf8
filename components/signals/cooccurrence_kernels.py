"""Compiled loops of the co-occurrence measures; what they compute is said in `glcm`.

Both entropies of a patch follow from one thing per offset: how many of the 4096 level pairs occur
how often. So pairs are counted, the counts are counted, and the logarithms are taken of those few.
"""

from __future__ import annotations

import numba
import numpy as np

from components.files.kernel_cache import cached
from components.signals.integer_kernels import plus

PATCH_PX = 64
PAIRS = 4096
"""64 levels times 64 levels."""


@numba.njit(nogil=True, error_model="numpy")
def _join(high: np.ndarray, low: np.ndarray, codes: np.ndarray) -> None:
    """One code per pair; also of pairs that wrap around an edge, which the caller overwrites."""
    for index in range(codes.size):
        codes[index] = np.uint16(high[index] + low[index])


@numba.njit(nogil=True, error_model="numpy")
def _count(codes: np.ndarray, tables: np.ndarray) -> None:
    """Count in four tables, so that equal neighbours do not wait for each other's increment.

    Args:
        codes: (4 n,) uint16.
        tables: (4, more than the largest code) uint16, which hold all pairs of a patch; together
            they fit into the processor's nearest cache, as wider ones would not.
    """
    words = codes.view(np.uint64)
    low = np.uint64(0xFFFF)
    for word in words:
        # An explicit uint16, or numba would add in 64 bits.
        tables[0, word & low] += np.uint16(1)
        tables[1, word >> np.uint64(16) & low] += np.uint16(1)
        tables[2, word >> np.uint64(32) & low] += np.uint16(1)
        tables[3, word >> np.uint64(48)] += np.uint16(1)


@numba.njit(nogil=True, error_model="numpy")
def _merge(tables: np.ndarray, merged: np.ndarray) -> None:
    """Sum of the four tables, which are zero again afterwards."""
    first, second = tables[0, : merged.size], tables[1, : merged.size]
    third, fourth = tables[2, : merged.size], tables[3, : merged.size]
    for pair in range(merged.size):
        merged[pair] = plus(plus(first[pair], second[pair]), plus(third[pair], fourth[pair]))
        # Cleared in passing, while the cells are in cache.
        first[pair] = 0
        second[pair] = 0
        third[pair] = 0
        fourth[pair] = 0


@numba.njit(nogil=True, error_model="numpy")
def _occurrences(
    merged: np.ndarray, present: np.ndarray, often: np.ndarray, seen: np.ndarray
) -> int:
    """How often each count above 0 occurs (sum of `often`); the distinct ones are listed in `seen`.

    No branch asks a cell: which pairs occur in a photograph no processor can foretell. What may be
    needed is written, and a position moves on only where it is.

    Args:
        merged: (n,) uint16 counts.
        present: (n + 1,) uint16 scratch: the counts above 0.
        often: (2, more than the largest count) uint32 zeros; equal neighbours go to both in turn.
        seen: (n + 1,) int64.
    """
    number = np.uint64(0)
    for pair in range(merged.size):
        count = merged[pair]
        present[number] = count
        number += np.uint64(count != 0)
    distinct = np.uint64(0)
    for index in range(number):
        place = np.uint64(index)
        count = present[place]
        seen[distinct] = count
        distinct += np.uint64((often[0, count] | often[1, count]) == 0)
        often[place & np.uint64(1), count] += np.uint32(1)
    return int(distinct)


@numba.njit(nogil=True, error_model="numpy")
def _entropy_of_frequencies(frequencies: np.ndarray, seen: np.ndarray, distinct: int) -> float:
    """Entropy in bits of listed frequencies that add up to 2^16; clears them."""
    total = 0.0
    for index in range(distinct):
        frequency = float(frequencies[seen[index]])
        frequencies[seen[index]] = 0
        total += frequency * np.log2(frequency)
    # -sum f/N log2 f/N with N = 2^16 cells, log2 N taken out of the sum.
    return 16.0 - total / 65536.0


@cached
@numba.njit(nogil=True, error_model="numpy")
def patch_entropies(
    gray: np.ndarray,
    offsets: np.ndarray,
    value_ids: np.ndarray,
    count_log_count: np.ndarray,
    values: int,
) -> tuple[float, float, int]:
    """Sums over patches of the two entropies, and the number of patches.

    Args:
        gray: (H, W) uint8.
        offsets: (n, 4) int64: row, column, how many of the 16 (distance, angle) matrices it stands
            for, and its row in `value_ids`.
        value_ids: (classes, 4097) int32: one number per distinct value count / pairs.
        count_log_count: (4097,) float64, c log2 c, and 0 for 0.
        values: how many distinct values there are.
    """
    # The top-left square alone, as the released script crops.
    edge = min(gray.shape[0], gray.shape[1])
    # Flat and with room for the longest offset: a slice per offset instead of one per row, whose
    # reference counting would take longer than its pixels.
    high = np.empty(PATCH_PX * PATCH_PX, np.uint16)
    low = np.zeros(PATCH_PX * PATCH_PX + PATCH_PX, np.uint16)
    codes = np.empty(PATCH_PX * PATCH_PX, np.uint16)
    # One cell more than pairs, for those that wrap around an edge.
    tables = np.zeros((4, PAIRS + 1), np.uint16)
    merged = np.empty(PAIRS, np.uint16)
    present = np.empty(PAIRS + 1, np.uint16)
    often = np.zeros((2, PAIRS + 1), np.uint32)
    seen_counts = np.empty(PAIRS + 1, np.int64)
    # Cleared by whoever reads them, cell by cell: most of these cells are never touched.
    frequencies = np.zeros(values, np.int64)
    seen_values = np.empty(values, np.int64)
    score = 0.0
    haralick = 0.0
    patches = 0
    for top in range(0, edge - PATCH_PX + 1, PATCH_PX):
        for left in range(0, edge - PATCH_PX + 1, PATCH_PX):
            lowest = np.uint8(255)
            highest = np.uint8(0)
            for y in range(PATCH_PX):
                row = gray[top + y, left : left + PATCH_PX]
                for x in range(PATCH_PX):
                    lowest = min(lowest, row[x])
                    highest = max(highest, row[x])
            # Only levels between the extremes take part: small tables for smooth patches.
            first = np.uint16(lowest >> 2)
            levels = np.uint16((highest >> 2) - first + 1)
            for y in range(PATCH_PX):
                row = gray[top + y, left : left + PATCH_PX]
                for x in range(PATCH_PX):
                    level = np.uint16((row[x] >> 2) - first)
                    low[PATCH_PX * y + x] = level
                    high[PATCH_PX * y + x] = np.uint16(level * levels)
            size = int(levels) * int(levels)
            distinct_values = 0
            for index in range(offsets.shape[0]):
                down, across, weight, values_row = offsets[index]
                width = PATCH_PX - abs(across)
                joined = codes[: PATCH_PX * (PATCH_PX - down)]
                # In flat memory a step (down, across) is one shift, across to the left included.
                shift = PATCH_PX * down + across
                _join(high[: joined.size], low[shift : shift + joined.size], joined)
                # Pairs that wrap around an edge are counted in a cell beyond the last pair.
                wrapped = width if across > 0 else 0
                for y in range(PATCH_PX - down):
                    for x in range(wrapped, wrapped + abs(across)):
                        joined[PATCH_PX * y + x] = np.uint16(size)
                _count(joined, tables)
                # Forgotten before it can be merged.
                tables[:, size] = 0
                _merge(tables, merged[:size])
                distinct = _occurrences(merged[:size], present, often, seen_counts)
                pairs = width * (PATCH_PX - down)
                occurring = 0
                sum_of_logs = 0.0
                for position in range(distinct):
                    count = seen_counts[position]
                    cells = int(often[0, count]) + int(often[1, count])
                    often[0, count] = 0
                    often[1, count] = 0
                    # Cells, not pairs: both entropies ask how many cells of the matrix hold this
                    # count.
                    occurring += cells
                    sum_of_logs += cells * count_log_count[count]
                    value = value_ids[values_row, count]
                    if frequencies[value] == 0:
                        seen_values[distinct_values] = value
                        distinct_values += 1
                    # `weight`: diagonal offsets round together, so some of the 16 matrices are the
                    # same one.
                    frequencies[value] += weight * cells
                # Pairs that never occur are values too (0): the released entropy is that of the
                # whole array.
                zero = value_ids[values_row, 0]
                if occurring < PAIRS:
                    if frequencies[zero] == 0:
                        seen_values[distinct_values] = zero
                        distinct_values += 1
                    frequencies[zero] += weight * (PAIRS - occurring)
                haralick += weight * (np.log2(float(pairs)) - sum_of_logs / pairs) / 16.0
            score += _entropy_of_frequencies(frequencies, seen_values, distinct_values)
            patches += 1
    return score, haralick, patches
