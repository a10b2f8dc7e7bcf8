"""Means with bootstrap confidence intervals, and paired differences.

Everything is float64 and seeded. With a handful of images an interval is wide and still
optimistic, so the number of images travels with every estimate and n < 2 is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_CHUNK_VALUES = 4_000_000
"""Values resampled at a time: bounds memory at 32 MB for any n."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its percentile-bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int
    confidence: float


def _finite(values: Sequence[float] | npt.ArrayLike) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size < 2:
        raise ValueError(
            f"an interval needs at least 2 values in one dimension, got shape {array.shape}; "
            "report the single value without an interval"
        )
    if not np.isfinite(array).all():
        raise ValueError("values must be finite; leave unmeasurable images out and count them")
    return array


def bootstrap_mean(
    values: Sequence[float] | npt.ArrayLike,
    *,
    resamples: int,
    seed: int,
    confidence: float = 0.95,
) -> Estimate:
    """Mean of `values` with a percentile-bootstrap interval (Efron 1979).

    Args:
        values: (n,) finite numbers, one per independent image, n >= 2.
        resamples: bootstrap resamples, at least 100.
        seed: of the resampling.
        confidence: coverage in (0, 1).

    Raises:
        ValueError: n < 2, a value that is not finite, or a bad argument.
    """
    if resamples < 100:
        raise ValueError(f"resamples {resamples} must be at least 100")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence {confidence} must lie in (0, 1)")
    array = _finite(values)
    generator = np.random.default_rng(seed)
    means: list[npt.NDArray[np.float64]] = []
    rows = max(1, _CHUNK_VALUES // array.size)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        picks = generator.integers(0, array.size, size=(count, array.size))
        means.append(array[picks].mean(axis=1))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return Estimate(float(array.mean()), float(low), float(high), int(array.size), confidence)


def paired_difference(
    before: Sequence[float] | npt.ArrayLike,
    after: Sequence[float] | npt.ArrayLike,
    *,
    resamples: int,
    seed: int,
    confidence: float = 0.95,
) -> Estimate:
    """Mean of `after - before` over the same images, images resampled as pairs.

    Args:
        before: (n,) values of the first system.
        after: (n,) values of the second one, same images in the same order.
        resamples: as in `bootstrap_mean`.
        seed: as in `bootstrap_mean`.
        confidence: as in `bootstrap_mean`.

    Raises:
        ValueError: lengths differ, or as `bootstrap_mean`.
    """
    first, second = _finite(before), _finite(after)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal lengths, got {first.size} and {second.size}")
    return bootstrap_mean(second - first, resamples=resamples, seed=seed, confidence=confidence)
