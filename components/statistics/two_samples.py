"""Do two samples come from one distribution? Sizes of differences, each with its p-value.

A size alone cannot tell: among eleven numbers one that moves is a distance of 0.09. A p-value alone
cannot either: among a million every difference is significant. So each function returns both.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_LEAST_EXPECTED = 5.0
"""Below it in a cell (Cochran 1952) the chi-squared distribution is no good approximation."""
_TABLES = 9_999
_MOST_GROUPS = 50
"""Rarer categories count as one: random tables of thousands of columns take minutes."""


def kolmogorov_smirnov(
    before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]
) -> tuple[float, float]:
    """Largest distance of the empirical distribution functions, 0 to 1, and its p-value.

    Exact up to 10,000 values, by Kolmogorov's limit beyond; with ties the p-value is too large
    rather than too small.

    Args:
        before: (N,) finite, N >= 1.
        after: (M,) finite, M >= 1.
    """
    from scipy.stats import ks_2samp

    found = ks_2samp(before, after)
    return float(found.statistic), float(found.pvalue)


def same_shares(before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]) -> float:
    """p-value of "both vectors of counts are drawn from the same shares".

    Pearson's chi-squared test; where a count of fewer than 5 is expected, the same statistic is
    compared with those of 9,999 random tables of the same sums (drawn from a fixed seed), which is
    exact at any size.

    Args:
        before: (C,) counts of each category.
        after: (C,) of the same categories.

    Returns:
        0 to 1; 1 where there is nothing to compare.
    """
    from scipy.stats import MonteCarloMethod, chi2_contingency
    from scipy.stats.contingency import expected_freq

    table = np.stack([before, after])
    table = table[:, np.argsort(-table.sum(axis=0), kind="stable")]
    rare = table[:, _MOST_GROUPS:].sum(axis=1, keepdims=True)
    table = np.concatenate([table[:, :_MOST_GROUPS], rare], axis=1)
    table = table[:, table.sum(axis=0) > 0]
    if table.shape[1] < 2 or not table.sum(axis=1).all():
        return 1.0
    if expected_freq(table).min() >= _LEAST_EXPECTED:
        return float(chi2_contingency(table, correction=False).pvalue)
    method = MonteCarloMethod(n_resamples=_TABLES, rng=np.random.default_rng(0))
    return float(chi2_contingency(table, correction=False, method=method).pvalue)
