"""Gray-level co-occurrence texture: Diffusion-4K's GLCM score and the textbook entropy.

Both use 64 gray levels, 64x64 patches of the top-left square, distances 1 to 4 and the angles 0,
45, 90 and 135 degrees, normalised, not symmetric (Haralick 1973). They differ in what they take the
entropy of:

- `glcm_score`: of the histogram of *distinct values* in a patch's whole 64x64x4x4 array, as the
  released Diffusion-4K script does (it hands the array to skimage's `shannon_entropy`).
- `glcm_entropy_bits`: of the co-occurrence probabilities themselves, -sum p log2 p, mean over the
  16 (distance, angle) matrices; 0 to 12 bits.
"""

from __future__ import annotations

import functools

import numpy as np

LEVELS = 64
PATCH_PX = 64
# (row, column) offsets for distances 1..4 at 0, 45, 90 and 135 degrees, as skimage rounds
# (d sin a, d cos a): diagonal distance 1 is (1, 1) as is distance 2 (1.41 rounds to 1).
_OFFSETS = tuple(
    (int(np.round(np.sin(angle) * distance)), int(np.round(np.cos(angle) * distance)))
    for distance in (1, 2, 3, 4)
    for angle in (0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
)


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """offsets, value_ids, count_log_count and values of `patch_entropies`.

    A value is count / pairs. Two offsets with equal pair counts share values for equal counts; two
    with different ones share a value when the fractions are equal as float64, as np.unique sees it.
    """
    distinct = sorted(set(_OFFSETS))
    pairs = [(PATCH_PX - row) * (PATCH_PX - abs(column)) for row, column in distinct]
    classes = sorted(set(pairs))
    offsets = np.array(
        [
            (row, column, _OFFSETS.count((row, column)), classes.index(number))
            for (row, column), number in zip(distinct, pairs, strict=True)
        ],
        np.int64,
    )
    # All counts that a matrix can hold: values are compared as fractions, so equal ones of
    # different offsets fall together.
    counts = np.arange(LEVELS * LEVELS + 1)
    values, index = np.unique(counts / np.array(classes)[:, None], return_inverse=True)
    # 0 log 0 is 0 here, as in every entropy.
    logs = counts * np.log2(np.maximum(counts, 1))
    return offsets, index.reshape(len(classes), -1).astype(np.int32), logs, values.size


def glcm_measures(gray: np.ndarray) -> tuple[float, float] | None:
    """(glcm_score, glcm_entropy_bits), each the mean over patches, in one pass.

    Within 1e-12 of skimage's matrices and entropies (tested).

    Args:
        gray: (H, W) uint8 from `flat_regions.grayscale`.

    Returns:
        None when no 64x64 patch fits.
    """
    if min(gray.shape) < PATCH_PX:
        return None
    # numba: a second that only processes pay which compute texture.
    from components.signals.cooccurrence_kernels import patch_entropies

    score, haralick, patches = patch_entropies(np.ascontiguousarray(gray), *_tables())
    return score / patches, haralick / patches
