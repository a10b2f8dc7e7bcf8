"""At which quality a JPEG was saved, estimated from its quantisation tables.

The IJG library scales the example tables of the JPEG standard (ITU-T T.81, annex K) by a quality of
1 to 100, and most encoders use its tables. The estimate is the quality whose scaled tables are
nearest to the file's in the sum of absolute differences; table 0 counts as luma, 1 as chroma. For
IJG tables that is the quality itself; other tables (cameras, Photoshop) get the nearest.
"""

from __future__ import annotations

import functools

import numpy as np

_LUMA = """
16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101
72 92 95 98 112 100 103 99
"""
_CHROMA_ROWS = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))
_CHROMA_FILL = 99


def _standard_tables() -> np.ndarray:
    """(2, 64) int64: annex K's luma and chroma tables in row order."""
    chroma = np.full((8, 8), _CHROMA_FILL)
    chroma[:4, :4] = _CHROMA_ROWS
    return np.stack([np.array(_LUMA.split(), np.int64), chroma.ravel()])


@functools.cache
def _tables_by_quality() -> np.ndarray:
    """(100, 2, 64) int64: the library's tables for quality 1 to 100, 8-bit steps."""
    quality = np.arange(1, 101)
    # The library's own scaling with its integer divisions: rounding is part of the tables.
    percent = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)[:, None, None]
    # At least 1: a step of 0 cannot be divided by. At most 255: baseline JPEG has 8-bit steps.
    tables: np.ndarray = np.clip((_standard_tables() * percent + 50) // 100, 1, 255)
    return tables


def jpeg_quality(quantization: dict[int, list[int]]) -> int | None:
    """Estimated quality of a file.

    Args:
        quantization: tables by number as PIL gives them: 64 steps in row order.

    Returns:
        1 to 100 (the lowest of equally near ones), or None without a usable table.
    """
    # Of whatever is there: a gray JPEG has no chroma table.
    numbers = [number for number in (0, 1) if len(quantization.get(number, ())) == 64]
    if not numbers:
        return None
    tables = np.array([quantization[number] for number in numbers], np.int64)
    distances = np.abs(_tables_by_quality()[:, numbers] - tables).sum(axis=(1, 2))
    return int(distances.argmin()) + 1
