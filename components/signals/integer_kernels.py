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
