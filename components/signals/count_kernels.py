"""Compiled counting of small integers, shared by gray histograms and co-occurrence matrices."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(nogil=True, error_model="numpy")
def count_in_four(values: np.ndarray, tables: np.ndarray) -> None:
    """Count in four tables, so that equal neighbours do not wait for each other's increment.

    Args:
        values: (n,) unsigned integers.
        tables: (4, more than the largest value) uint32; their sum grows by the histogram.
    """
    whole = values.size // 4
    for block in range(whole):
        x = 4 * block
        # An explicit uint32, or numba would add in 64 bits.
        tables[0, values[x]] += np.uint32(1)
        tables[1, values[x + 1]] += np.uint32(1)
        tables[2, values[x + 2]] += np.uint32(1)
        tables[3, values[x + 3]] += np.uint32(1)
    # At most three are left; the tables are summed, so any of them may take these.
    for x in range(4 * whole, values.size):
        tables[0, values[x]] += np.uint32(1)
