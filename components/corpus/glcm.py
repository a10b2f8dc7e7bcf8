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

from collections.abc import Iterator

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


def _patches(gray: np.ndarray) -> Iterator[np.ndarray]:
    """Full 64x64 patches, row by row, of the top-left min(H, W) square, 64 levels, int64."""
    edge = min(gray.shape)
    levels = (gray[:edge, :edge] >> 2).astype(np.int64)
    for top in range(0, edge - PATCH_PX + 1, PATCH_PX):
        for left in range(0, edge - PATCH_PX + 1, PATCH_PX):
            yield levels[top : top + PATCH_PX, left : left + PATCH_PX]


def _pair_counts(patch: np.ndarray, row: int, column: int) -> np.ndarray:
    """Counts of the level pairs (at p, at p + offset), (4096,) int64; `row` is at least 0."""
    height, width = patch.shape
    here = patch[: height - row, max(0, -column) : width - max(0, column)]
    there = patch[row:, max(0, column) : width - max(0, -column)]
    return np.bincount((here * LEVELS + there).ravel(), minlength=LEVELS * LEVELS)


def _entropy_of_frequencies(frequencies: np.ndarray) -> float:
    probabilities = frequencies / frequencies.sum()
    return float(-(probabilities * np.log2(probabilities)).sum())


def _distinct_value_entropy(counts: list[np.ndarray]) -> float:
    """Entropy of how often each value occurs in the array of normalised counts.

    A value is count / pairs. Two offsets with equal pair counts share values for equal counts; two
    with different ones share a value when the fractions are equal as float64, as np.unique sees it.
    """
    values = []
    frequencies = []
    for count in counts:
        histogram = np.bincount(count)
        present = np.flatnonzero(histogram)
        values.append(present / count.sum())
        frequencies.append(histogram[present])
    _, index = np.unique(np.concatenate(values), return_inverse=True)
    return _entropy_of_frequencies(np.bincount(index, weights=np.concatenate(frequencies)))


def _haralick_entropy(counts: list[np.ndarray]) -> float:
    return float(np.mean([_entropy_of_frequencies(count[count > 0]) for count in counts]))


def glcm_measures(gray: np.ndarray) -> tuple[float, float] | None:
    """(glcm_score, glcm_entropy_bits), each the mean over patches, in one pass.

    Args:
        gray: (H, W) uint8 from `flat_regions.grayscale`.

    Returns:
        None when no 64x64 patch fits.
    """
    scores = []
    entropies = []
    for patch in _patches(gray):
        counts = [_pair_counts(patch, row, column) for row, column in _OFFSETS]
        scores.append(_distinct_value_entropy(counts))
        entropies.append(_haralick_entropy(counts))
    if not scores:
        return None
    return float(np.mean(scores)), float(np.mean(entropies))
