"""Two systems on the same pictures: paired differences, corrected p-values, or a stated refusal.

What cannot be compared is refused with the reason, never approximated: other protocols, pictures
that only one system has, values that are not finite, too few prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from components.evaluation.statistics.bootstrap import (
    ASYMMETRY_GAIN_CLUSTERS,
    FEWEST_STUDENTISED_CLUSTERS,
    Estimate,
    cluster_sums,
    extended,
    studentised_draws,
    sums_interval,
    two_sided_p_value,
)
from components.evaluation.statistics.permutation import paired_permutation
from components.evaluation.statistics.power import minimum_detectable_effect
from components.metrics.cards import card
from components.statistics.multiple_tests import holm

KEY = ["image", "height", "width"]
"""What a picture of one system must share with its partner."""
_P_VALUE_RESAMPLES = 4
"""Times those of other intervals: Holm's levels lie farther out than 2.5%, where draws are few."""
DIRECTION_GAIN_CLUSTERS = 64.0
"""See `compared_means`. Calibrated: at 4 times the intervals' own, pages of eight tests over 24, 50
and 100 prompts find log-normal differences (sigma 1) of mean 0 in 5% to 6%; at 2 times in 9%."""
CLUSTER_COLUMN = "prompt"
"""Where a row has one, pictures of a prompt form a cluster; else those of an image name."""


class ComparisonInvalid(ValueError):
    """The numbers at hand do not allow this comparison; one line saying why."""


@dataclass(frozen=True)
class PairedScores:
    """One metric of two systems, picture by picture."""

    metric: str
    protocol: str
    before: npt.NDArray[np.float64]
    """(n,) of the first system."""
    after: npt.NDArray[np.float64]
    """(n,) of the second one."""
    clusters: tuple[str, ...]
    """(n,) prompt, or image name, of each pair."""
    unmeasurable: int
    """Pairs left out because the metric is undefined for both pictures."""

    @property
    def differences(self) -> npt.NDArray[np.float64]:
        """(n,) after - before."""
        return self.after - self.before


@dataclass(frozen=True)
class Comparison:
    """One metric of two systems."""

    metric: str
    protocol: str
    before: float
    """Mean of the first system."""
    after: float
    difference: Estimate
    """Mean of after - before with its interval."""
    p_value: float
    """See `compared_means`."""
    adjusted_p: float
    """After Holm over the metrics compared together."""
    detectable: float
    """Smallest true difference that would be found with power 0.8 at level 0.05."""
    unmeasurable: int


@dataclass(frozen=True)
class Refusal:
    """A metric that could not be compared."""

    metric: str
    reason: str


def _one_system(table: pd.DataFrame, metric: str, name: str) -> pd.DataFrame:
    rows = table[table["metric"] == metric]
    if rows.empty:
        how = " with evaluate.lattice" if metric.startswith("lattice_") else ""
        raise ComparisonInvalid(f"{metric}: {name} has no rows; measure it there first{how}")
    # A second row of a picture would shift every later pair, since pairs go by position.
    twice = rows[rows.duplicated(KEY)]
    if not twice.empty:
        raise ComparisonInvalid(
            f"{metric}: {name} has two rows of {twice.iloc[0]['image']} at the same size; keep one "
            "(several systems in one table? select one first)"
        )
    # Sorted here, because from here on row i of one table belongs to row i of the other.
    return rows.set_index(KEY).sort_index()


def _clusters(metric: str, first: pd.DataFrame, second: pd.DataFrame) -> list[str]:
    """Prompt of each pair, from whichever table knows it; else the image name."""
    images = first.index.get_level_values(0)
    # One of the tables may be older than the column, or hold pictures without a prompt.
    known: list[list[str | None]] = [
        [text if isinstance(text, str) else None for text in table[CLUSTER_COLUMN]]
        if CLUSTER_COLUMN in table
        else [None] * len(images)
        for table in (first, second)
    ]
    labels = []
    for image, ours, theirs in zip(images, *known, strict=True):
        # A name alone is no identity: the same file name from two prompts is no pair.
        if ours is not None and theirs is not None and ours != theirs:
            raise ComparisonInvalid(
                f"{metric}: {image} was made from another prompt in one system; compare the same "
                "prompts, seeds and sizes"
            )
        # Marked, so that a prompt that reads like an image's name is no cluster with it.
        prompt = ours if ours is not None else theirs
        labels.append(f"image {image}" if prompt is None else f"prompt {prompt}")
    return labels


def paired_scores(before: pd.DataFrame, after: pd.DataFrame, metric: str) -> PairedScores:
    """Pair two systems' rows of one metric.

    Args:
        before: scores of the first system, with the columns of `statistics.scores` and
            optionally `prompt`.
        after: scores of the second one.
        metric: id of a card.

    Raises:
        ComparisonInvalid: missing or duplicate rows, a picture that only one system has, more than
            one protocol, one picture of two prompts, or a value that is not finite in one system
            only.
    """
    first = _one_system(before, metric, "the first system")
    second = _one_system(after, metric, "the second system")
    # Two protocols are two metrics under one name (FID with and without antialiasing).
    protocols = sorted({*first["protocol"], *second["protocol"]})
    if len(protocols) > 1:
        raise ComparisonInvalid(
            f"{metric}: protocols {' and '.join(protocols)} do not compare; measure both anew"
        )
    # Refused, not left out: a system that fails on its hard pictures would gain by it.
    alone = sorted(set(first.index) ^ set(second.index))
    if alone:
        image, height, width = alone[0]
        raise ComparisonInvalid(
            f"{metric}: {len(alone)} pictures have no partner, such as {image} at "
            f"{height}x{width}; compare the same prompts, seeds and sizes"
        )
    values = np.stack([first["value"].to_numpy(float), second["value"].to_numpy(float)])
    finite = np.isfinite(values)
    # Infinite on both sides is refused too (PSNR of equal pictures): inf - inf is no difference.
    if np.isinf(values).any() or (finite[0] != finite[1]).any():
        at = int(np.flatnonzero(np.isinf(values).any(axis=0) | (finite[0] != finite[1]))[0])
        raise ComparisonInvalid(
            f"{metric}: {first.index[at][0]} is {values[0, at]:.6g} and {values[1, at]:.6g}; a "
            "value that is not finite cannot be averaged away"
        )
    # Undefined for both (a picture too small for the metric) says nothing about either and is
    # counted; undefined for one only would bias the difference and was refused above.
    both = finite[0]
    # Of all pairs, then cut down: labels must line up with the values that are kept.
    labels = _clusters(metric, first, second)
    clusters = tuple(label for label, kept in zip(labels, both, strict=True) if kept)
    return PairedScores(
        metric, protocols[0], values[0, both], values[1, both], clusters, int((~both).sum())
    )


def compared_means(
    pairs: PairedScores, *, resamples: int, seed: int, confidence: float = 0.95
) -> tuple[Estimate, float]:
    """Mean of after - before with its interval, and the p-value of "the mean is 0".

    Whole prompts are units of both, and both have the same draws: a p-value below 1 - confidence
    stands beside an interval without 0. It is the largest of those that err in different places.
    Flipping signs is exact where the systems are equal, whatever the distribution; where they
    differ in more than the mean, it finds a difference of means that is not there. The bootstrap in
    the direction of the difference, its asymmetry extended by `DIRECTION_GAIN_CLUSTERS`, errs for
    equal systems with skewed scores. The printed interval, inverted, counts where it holds 0.
    `benchmarks/family_wise_error.py` measures pages of all.

    Args:
        pairs: of one metric.
        resamples: both take four times as many draws.
        seed: of both.
        confidence: of the interval.

    Raises:
        ComparisonInvalid: fewer independent prompts than such an interval needs.
    """
    # Prompts count, not pictures: ten seeds of one prompt are one observation of it.
    independent = len(set(pairs.clusters))
    if independent < FEWEST_STUDENTISED_CLUSTERS:
        raise ComparisonInvalid(
            f"{pairs.metric}: {independent} independent prompts or images; an interval needs at "
            f"least {FEWEST_STUDENTISED_CLUSTERS}"
        )
    draws = _P_VALUE_RESAMPLES * resamples
    grouped = cluster_sums(pairs.differences, pairs.clusters)
    pivots = studentised_draws(grouped, resamples=draws, seed=seed)
    difference = sums_interval(
        grouped,
        pairs.differences.size,
        resamples=draws,
        seed=seed,
        confidence=confidence,
        pivots=pivots,
    )
    signs = paired_permutation(
        pairs.before, pairs.after, permutations=draws, seed=seed, clusters=pairs.clusters
    )
    printed, direction = (
        two_sided_p_value(grouped, extended(pivots, independent, gain))
        for gain in (ASYMMETRY_GAIN_CLUSTERS, DIRECTION_GAIN_CLUSTERS)
    )
    p_value = max(signs.p_value, direction / 2.0)
    return difference, max(p_value, printed) if printed >= 1.0 - confidence else p_value


def compare_systems(
    before: pd.DataFrame,
    after: pd.DataFrame,
    metrics: Sequence[str],
    *,
    resamples: int,
    seed: int,
    confidence: float = 0.95,
) -> list[Comparison | Refusal]:
    """Compare two systems metric by metric, in the order given.

    Args:
        before: as in `paired_scores`.
        after: as in `paired_scores`.
        metrics: ids; Holm's correction runs over those that could be compared.
        resamples: of the bootstrap and of sign patterns, both times 4 (`_P_VALUE_RESAMPLES`).
        seed: of all.
        confidence: of the intervals.
    """
    found: list[Comparison | Refusal] = []
    for metric in metrics:
        # An unknown id is the caller's mistake and raises; what the data does not allow is refused.
        card(metric)
        try:
            pairs = paired_scores(before, after, metric)
            difference, p_value = compared_means(
                pairs, resamples=resamples, seed=seed, confidence=confidence
            )
        except ComparisonInvalid as problem:
            # A refusal is a result: the other metrics still get their numbers.
            found.append(Refusal(metric, str(problem)))
            continue
        found.append(
            Comparison(
                metric,
                pairs.protocol,
                float(pairs.before.mean()),
                float(pairs.after.mean()),
                difference,
                p_value,
                # Holm needs all p-values first; this one is replaced below.
                p_value,
                minimum_detectable_effect(pairs.differences, clusters=pairs.clusters),
                pairs.unmeasurable,
            )
        )
    # Refused metrics are no tests, so they cost the others nothing.
    adjusted = holm({c.metric: c.p_value for c in found if isinstance(c, Comparison)})
    return [
        replace(c, adjusted_p=adjusted[c.metric]) if isinstance(c, Comparison) else c for c in found
    ]
