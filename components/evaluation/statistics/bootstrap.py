"""Means and ratios with confidence intervals whose units are prompts.

Everything is float64 and seeded. Images of one prompt are not independent, so whole clusters are
resampled: an interval over four seeds of each prompt as if they were independent covers 66% where
it says 95%. The number of values and of clusters travels with every estimate, and fewer than two of
either is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

_CHUNK_VALUES = 4_000_000
"""Values resampled at a time: bounds memory at 32 MB for any n."""
_ROUNDING = 1e-12
"""Relative: what is smaller is left of numbers that are equal."""


@dataclass(frozen=True)
class Estimate:
    """A mean (or ratio) and its interval."""

    mean: float
    low: float
    high: float
    n: int
    """Values."""
    confidence: float
    clusters: int | None = None
    """Independent groups that were resampled; None: the values themselves."""
    method: str = "extended"


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


IntervalMethod = Literal["extended", "studentised", "bca", "percentile"]
FEWEST_STUDENTISED_CLUSTERS = 6
"""Below it, resamples of one repeated cluster (k^(1-k) of them, 0.8% at 5) reach the tails."""
ASYMMETRY_GAIN_CLUSTERS = 16.0
"""See `extended`. Calibrated: the least multiple of 4 at which 95% intervals of 8 log-normal
prompts' means (sigma 1, skewness 6.2) hold the mean in 93% of samples and more."""


@dataclass(frozen=True)
class ClusterSums:
    """Values summed by cluster, centred on the overall mean for accuracy."""

    centre: float
    """Mean of all values."""
    sums: npt.NDArray[np.float64]
    """(k,) sum of value - centre in each cluster."""
    sizes: npt.NDArray[np.float64]
    """(k,) values in each cluster."""

    @property
    def clusters(self) -> int:
        """How many there are, k."""
        return int(self.sums.size)

    @property
    def standard_error(self) -> float:
        """Of the mean: the linearised ratio estimator, s / sqrt(n) where every cluster is one."""
        k = self.clusters
        # The mean is a ratio, sum over count, and clusters differ in size: the count varies with
        # the draw as the sum does. Centred sums are that ratio's first-order residuals. k / (k - 1)
        # because the centre was estimated from the same clusters.
        return float(np.sqrt(k / (k - 1) * np.square(self.sums).sum()) / self.sizes.sum())


def _spread(
    sums: npt.NDArray[np.float64], values: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Centred sums of values; zeros where all are rounding: the mean of 7 times 0.1 is not 0.1."""
    most = values.size / sums.size * np.abs(values).max()
    return sums if np.abs(sums).max() > _ROUNDING * most else np.zeros_like(sums)


def cluster_sums(
    values: Sequence[float] | npt.ArrayLike, clusters: Sequence[object] | None = None
) -> ClusterSums:
    """Group values that are not independent.

    Args:
        values: (n,) finite numbers.
        clusters: (n,) labels, such as the prompt of each image: several seeds or sizes of a prompt
            say little more than one. None: every value is a cluster of its own.

    Raises:
        ValueError: n < 2, a value that is not finite, labels of another length, or one cluster.
    """
    array = _finite(values)
    centre = float(array.mean())
    if clusters is None:
        # Deviations, since squares of values far from zero would lose the spread to rounding.
        return ClusterSums(centre, _spread(array - centre, array), np.ones_like(array))
    if len(clusters) != array.size:
        raise ValueError(f"{array.size} values need as many cluster labels, got {len(clusters)}")
    # By first appearance: labels need no order, and draws depend on the rows' order alone.
    numbers: dict[object, int] = {}
    codes = np.array([numbers.setdefault(label, len(numbers)) for label in clusters])
    if len(numbers) < 2:
        raise ValueError(
            f"all {array.size} values belong to one cluster ({clusters[0]!r}): an interval needs "
            "at least 2 independent prompts"
        )
    return ClusterSums(
        centre,
        _spread(np.bincount(codes, weights=array - centre).astype(np.float64), array),
        np.bincount(codes).astype(np.float64),
    )


def ratio_sums(
    numerators: npt.ArrayLike, denominators: npt.ArrayLike, clusters: Sequence[object]
) -> ClusterSums:
    """A ratio of sums, such as raw over compressed bytes of a set, as clusters.

    A mean is the ratio of a sum to a count; here the count is another sum, and all that is said of
    means holds: `centre` is the ratio, `sums` are its residuals and `sizes` the denominators.

    Args:
        numerators: (n,) finite.
        denominators: (n,) finite and positive.
        clusters: (n,) labels as in `cluster_sums`.

    Raises:
        ValueError: as `cluster_sums`, or a denominator that is not positive.
    """
    above, below = _finite(numerators), _finite(denominators)
    if not (below > 0.0).all():
        raise ValueError("a ratio needs positive denominators")
    ratio = float(above.sum() / below.sum())
    residuals = cluster_sums(above - ratio * below, clusters)
    weights = cluster_sums(below, clusters)
    return ClusterSums(
        ratio,
        _spread(residuals.sums + residuals.centre * residuals.sizes, above),
        weights.sums + weights.centre * weights.sizes,
    )


def _check_resampling(resamples: int, confidence: float) -> None:
    if resamples < 100:
        raise ValueError(f"resamples {resamples} must be at least 100")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence {confidence} must lie in (0, 1)")


def _counted(generator: np.random.Generator, draws: int, k: int) -> npt.NDArray[np.float64]:
    """(draws, k) how often each of k clusters is among k picks with replacement."""
    picks = generator.integers(0, k, size=(draws, k)) + k * np.arange(draws)[:, None]
    return np.bincount(picks.ravel(), minlength=draws * k).reshape(draws, k).astype(np.float64)


@lru_cache(maxsize=2)
def _kept_draws(k: int, resamples: int, seed: int) -> npt.NDArray[np.float64]:
    # A page's metrics and systems share prompts and seed, and so these draws.
    return _counted(np.random.default_rng(seed), resamples, k)


def _draws(k: int, resamples: int, seed: int) -> Iterator[npt.NDArray[np.float64]]:
    """`_counted` of all resamples, in parts that fit into memory."""
    rows = max(1, _CHUNK_VALUES // k)
    if resamples <= rows:
        yield _kept_draws(k, resamples, seed)
        return
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, rows):
        yield _counted(generator, min(rows, resamples - start), k)


def _resampled(
    grouped: ClusterSums, resamples: int, seed: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Means (about the centre) and standard errors of `resamples` draws of k clusters each."""
    k = grouped.clusters
    sums, sizes = grouped.sums, grouped.sizes
    # A draw's residual sum of squares, sum (s - m c)^2, needs its mean m, which is known only after
    # the draw. Written out it is these five sums, so one pass over the draws is enough.
    moments = np.stack([sums, sizes, sums * sums, sums * sizes, sizes * sizes])
    means: list[npt.NDArray[np.float64]] = []
    errors: list[npt.NDArray[np.float64]] = []
    for drawn in _draws(k, resamples, seed):
        # Not a matrix product: the order of its sums, and so their last bit, would depend on how
        # many draws are in memory, on some processors.
        total, count, squares, products, counts = np.einsum("mk,rk->mr", moments, drawn)
        # A ratio again: a draw that hits large clusters holds more values.
        mean = total / count
        # A draw that hits the mean is a tie; rounding must not decide its side.
        mean = np.where(np.abs(mean) <= 1e-12 * np.abs(sums).max(), 0.0, mean)
        spread = squares - 2.0 * mean * products + mean * mean * counts
        # A draw of one repeated cluster has no spread; what rounding leaves is not one.
        spread = np.where(spread <= 1e-12 * squares, 0.0, spread)
        means.append(mean)
        # `standard_error` of the draw's own clusters: dividing by it, not by the sample's, is what
        # makes the statistic a pivot.
        errors.append(np.sqrt(k / (k - 1) * spread) / count)
    return np.concatenate(means), np.concatenate(errors)


def studentised_draws(
    grouped: ClusterSums, *, resamples: int, seed: int
) -> npt.NDArray[np.float64]:
    """(resamples,) sorted t* = (mean* - mean) / se*, the pivot of the bootstrap-t interval.

    A draw without spread gives an infinite t* of its mean's sign (0 when it hits the mean).

    Raises:
        ValueError: fewer than `FEWEST_STUDENTISED_CLUSTERS` clusters.
    """
    if grouped.clusters < FEWEST_STUDENTISED_CLUSTERS:
        raise ValueError(
            f"a studentised interval needs at least {FEWEST_STUDENTISED_CLUSTERS} independent "
            f"prompts or images, got {grouped.clusters}"
        )
    means, errors = _resampled(grouped, resamples, seed)
    # Without spread the ratio is infinite on purpose: such a draw says that the tail was not
    # explored, and must widen the interval instead of vanishing from it.
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = np.where(means == 0.0, 0.0, means / errors)
    # Sorted, since bounds and p-values both look for order statistics.
    return np.sort(draws)


def extended(
    draws: npt.NDArray[np.float64], clusters: int, gain: float = ASYMMETRY_GAIN_CLUSTERS
) -> npt.NDArray[np.float64]:
    """Sorted draws of the pivot with their asymmetry extended.

    A sample of k clusters shows less skewness than it was drawn from (it cannot show more than
    about sqrt(k)), so the bootstrap's long tail is too short, by a share that falls as 1/k. Of two
    draws that face each other in the order, the one farther from 0 moves out by `gain` / k times
    the difference of their distances. Symmetric draws stay as they are. Deviation: the bootstrap-t
    of Efron (1982) has no such term (tested).

    Args:
        draws: (resamples,) of `studentised_draws`.
        clusters: k.
        gain: in clusters.
    """
    # Two infinite tails have no difference that could be told.
    with np.errstate(invalid="ignore"):
        longer = np.nan_to_num(draws + draws[::-1], nan=0.0, posinf=np.inf, neginf=-np.inf)
    is_upper = np.arange(draws.size) >= draws.size / 2
    moved = np.where(is_upper, np.maximum(longer, 0.0), np.minimum(longer, 0.0))
    # Sorted again: a difference may fall faster than the draws rise.
    return np.sort(draws + gain / clusters * moved)


def extended_draws(grouped: ClusterSums, *, resamples: int, seed: int) -> npt.NDArray[np.float64]:
    """`studentised_draws`, `extended`: the pivot of every printed interval.

    Raises:
        ValueError: as `studentised_draws`.
    """
    return extended(studentised_draws(grouped, resamples=resamples, seed=seed), grouped.clusters)


def one_sided_p_value(
    grouped: ClusterSums, draws: npt.NDArray[np.float64], null: float = 0.0
) -> float:
    """Of the hypothesis that the true mean is `null` or below; `extended_draws` are the pivot."""
    error = grouped.standard_error
    room = grouped.centre - null
    # Nothing varies: the sign of the room is certain, and p is as small as the draws allow.
    if error == 0.0:
        return 1.0 / (draws.size + 1) if room >= 0.0 else 1.0
    # +1 in both: the observed sample is one of its own resamples, so p is never 0.
    # "left": a draw that equals the observed room counts against the mean.
    above = draws.size - int(np.searchsorted(draws, room / error, side="left"))
    return (above + 1) / (draws.size + 1)


def two_sided_p_value(grouped: ClusterSums, draws: npt.NDArray[np.float64]) -> float:
    """Of the hypothesis that the true mean is 0: the interval of these draws, inverted.

    Below 1 - confidence where the interval of that confidence leaves out 0, but for one draw (the
    observed sample is counted among its own resamples, so p is never 0).
    """
    # Also where nothing varies, which leaves no draws to count.
    if grouped.centre == 0.0:
        return 1.0
    # Resamples of mirrored values are the mirrored resamples.
    mirrored = ClusterSums(-grouped.centre, -grouped.sums, grouped.sizes)
    smaller = min(one_sided_p_value(grouped, draws), one_sided_p_value(mirrored, -draws[::-1]))
    return min(1.0, 2.0 * smaller)


def _bca_levels(
    grouped: ClusterSums, means: npt.NDArray[np.float64], levels: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Quantile levels corrected for bias and acceleration (Efron 1987, equation 6.8)."""
    from scipy.special import ndtr, ndtri

    # Ties count half: with few clusters many draws hit the mean exactly, and counting them on one
    # side would read as bias.
    below = (np.sum(means < 0.0) + np.sum(means <= 0.0)) / (2.0 * means.size)
    # All draws on one side would be an infinite bias and NaN levels: half a draw is left over.
    below = np.clip(below, 0.5 / means.size, 1.0 - 0.5 / means.size)
    # Both corrections are in units of the normal scale; 0 and 0 give the percentile interval back.
    bias = ndtri(below)
    total, count = grouped.sums.sum(), grouped.sizes.sum()
    # Skewness of the jackknife, leaving out whole clusters: the unit that is resampled.
    left_out = (total - grouped.sums) / (count - grouped.sizes)
    moved = left_out.mean() - left_out
    spread = np.square(moved).sum()
    acceleration = np.power(moved, 3).sum() / (6.0 * spread**1.5) if spread > 0.0 else 0.0
    shifted = bias + ndtri(levels)
    # Efron's correction has a pole; beyond it the level has reached the end on its own side.
    room = 1.0 - acceleration * shifted
    with np.errstate(divide="ignore"):
        moved_to = np.where(room > 0.0, shifted / room, np.copysign(np.inf, shifted))
    corrected: npt.NDArray[np.float64] = ndtr(bias + moved_to)
    return corrected


def _student(grouped: ClusterSums, level: float) -> float:
    """Reach about the centre of Student's t with clusters - 1 degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(grouped.clusters - 1, level)) * grouped.standard_error


def _pivotal(
    draws: npt.NDArray[np.float64], levels: npt.NDArray[np.float64], error: float
) -> tuple[float, float]:
    """Ends about the centre from draws of the pivot."""
    # Nearest order statistics: interpolating next to an infinite draw would give NaN. The upper
    # quantile gives the lower end, because the pivot is subtracted.
    upper, lower = np.quantile(draws, levels[::-1], method="nearest")
    return -float(upper) * error, -float(lower) * error


def sums_interval(
    grouped: ClusterSums,
    n: int,
    *,
    resamples: int,
    seed: int,
    confidence: float = 0.95,
    method: IntervalMethod = "extended",
    pivots: npt.NDArray[np.float64] | None = None,
) -> Estimate:
    """As `mean_interval`, of values that are grouped already.

    Args:
        grouped: from `cluster_sums` or `ratio_sums`.
        n: values.
        resamples: as in `mean_interval`.
        seed: as in `mean_interval`.
        confidence: as in `mean_interval`.
        method: as in `mean_interval`.
        pivots: `studentised_draws` of these very arguments, where somebody has them already.
    """
    _check_resampling(resamples, confidence)
    tail = (1.0 - confidence) / 2.0
    levels = np.array([tail, 1.0 - tail])
    low: float
    high: float
    if not grouped.sums.any():
        # Equal values, or clusters with equal means: nothing varies between resamples.
        low = high = 0.0
    elif method == "extended" and grouped.clusters < FEWEST_STUDENTISED_CLUSTERS:
        high = _student(grouped, float(levels[1]))
        low = -high
    elif method in ("extended", "studentised"):
        if pivots is None:
            pivots = studentised_draws(grouped, resamples=resamples, seed=seed)
        if method == "extended":
            pivots = extended(pivots, grouped.clusters)
        low, high = _pivotal(pivots, levels, grouped.standard_error)
    else:
        means, _ = _resampled(grouped, resamples, seed)
        if method == "bca":
            levels = _bca_levels(grouped, means, levels)
        low, high = (float(end) for end in np.quantile(means, levels))
    centre = grouped.centre
    return Estimate(centre, centre + low, centre + high, n, confidence, grouped.clusters, method)


def mean_interval(
    values: Sequence[float] | npt.ArrayLike,
    *,
    resamples: int,
    seed: int,
    clusters: Sequence[object] | None = None,
    confidence: float = 0.95,
    method: IntervalMethod = "extended",
) -> Estimate:
    """Mean of `values` with a two-sided interval, whole clusters as units.

    Coverage of 95% intervals in simulated samples of 8 to 50 clusters (normal, skewed, heavy-tailed
    and discrete cluster means): see the table of docs/evaluation.md, which
    `benchmarks/interval_coverage.py` makes. BCa and percentile intervals stay within the range of
    the values; the others need not.

    Args:
        values: (n,) finite numbers.
        resamples: bootstrap resamples, at least 100; 2,000 for a stable 95% interval.
        seed: of the resampling.
        clusters: (n,) labels as in `cluster_sums`.
        confidence: coverage in (0, 1).
        method: "extended" (`extended_draws`; with fewer than 6 clusters Student's t),
            "studentised" (Efron 1982, bootstrap-t), "bca" (Efron 1987) or "percentile". Shares have
            `wilson_interval` instead.

    Raises:
        ValueError: too few values or clusters, a value that is not finite, or a bad argument.
    """
    grouped = cluster_sums(values, clusters)
    return sums_interval(
        grouped,
        int(grouped.sizes.sum()),
        resamples=resamples,
        seed=seed,
        confidence=confidence,
        method=method,
    )
