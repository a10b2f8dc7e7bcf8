"""What a paired comparison can see: the minimum detectable effect, and the number of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt

from components.evaluation.statistics.bootstrap import cluster_sums


def paired_power(effect: float, standard_error: float, df: int, alpha: float) -> float:
    """Power of the two-sided paired t-test (Cohen 1988, noncentral t).

    Args:
        effect: true mean difference.
        standard_error: of the mean difference, > 0.
        df: independent pairs minus 1, >= 1.
        alpha: significance level in (0, 1).
    """
    from scipy.stats import nct, t

    critical = t.ppf(1.0 - alpha / 2.0, df)
    shift = abs(effect) / standard_error
    # The far tail too: at small effects a finding in the wrong direction is a finding, and power
    # must tend to alpha there.
    return float(nct.sf(critical, df, shift) + nct.cdf(-critical, df, shift))


def non_inferiority_power(margin: float, standard_error: float, df: int, level: float) -> float:
    """Chance that a model that is truly equal to the baseline passes a rule of non-inferiority.

    Of the one-sided t-test (Julious 2004): the lower bound of a true difference of 0 lies above
    -margin.

    Args:
        margin: >= 0, in the metric's unit.
        standard_error: of the mean difference, >= 0.
        df: independent prompts minus 1, >= 1.
        level: one-sided, in (0, 1).
    """
    from scipy.stats import nct, t

    if standard_error == 0.0:
        return 1.0
    return float(nct.sf(t.ppf(1.0 - level, df), df, margin / standard_error))


def minimum_detectable_effect(
    differences: Sequence[float] | npt.ArrayLike,
    *,
    clusters: Sequence[object] | None = None,
    power: float = 0.8,
    alpha: float = 0.05,
) -> float:
    """Smallest true mean difference that a comparison of this size and spread finds.

    Args:
        differences: (n,) paired differences; their spread is used, never their mean (power at the
            observed effect would only restate the p-value).
        clusters: (n,) labels as in `components.evaluation.statistics.bootstrap.cluster_sums`.
        power: chance of finding it, in (alpha, 1).
        alpha: two-sided significance level, in (0, 1).

    Returns:
        In the unit of the metric; 0.0 where the differences do not vary.

    Raises:
        ValueError: as `cluster_sums`, or a bad level.
    """
    from scipy.optimize import brentq

    if not 0.0 < alpha < power < 1.0:
        raise ValueError(f"alpha {alpha} and power {power} must fulfil 0 < alpha < power < 1")
    grouped = cluster_sums(differences, clusters)
    error = grouped.standard_error
    if error == 0.0:
        return 0.0
    # Degrees of freedom of prompts, not of pictures: pictures of one prompt repeat each other.
    df = grouped.clusters - 1
    # In units of the standard error, so that one bracket serves metrics of any scale.
    # Power rises with the effect from alpha at 0, which is below the wanted one: doubling ends, and
    # the root is bracketed.
    high = 1.0
    while paired_power(high, 1.0, df, alpha) < power:
        high *= 2.0
    root = brentq(lambda effect: paired_power(effect, 1.0, df, alpha) - power, 0.0, high)
    return float(root) * error
