"""Two systems by their distances to one reference set: FID, KID and their kind.

A set has one number, so there is nothing to pair picture by picture. What can be exchanged under
the null hypothesis are the two systems' pictures of one prompt; the distances of the exchanged sets
are what the observed difference is compared with. Nothing is said about intervals: at the sizes at
hand a Fréchet distance is nearly all bias, which the difference of two sets of equal size loses and
an interval of one of them would not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from components.evaluation.statistics.permutation import (
    PermutationResult,
    Rows,
    set_distance_permutation,
)
from components.metrics.cards import card
from components.metrics.metric import Features, PooledDistance, PooledSetMetric, SetMetric

MOST_ROWS = 8_000
"""Of both systems and the reference together: their products fill a matrix of 512 MB in float64."""


class SetsTooLarge(ValueError):
    """More rows of features than a permutation test holds at once; one line."""


@dataclass(frozen=True)
class SetComparison:
    """One metric of two sets against one reference."""

    metric: str
    protocol: str
    baseline: str
    """System that `before` is of."""
    system: str
    before: float
    after: float
    p_value: float
    """Two-sided, prompts exchanged between the systems."""
    pictures: int
    """Pairs."""
    prompts: int
    """Units of the exchange."""
    permutations: int
    stratum: str = ""
    """Of a part of the suite; empty: of all pictures."""

    @property
    def difference(self) -> float:
        """After - before."""
        return self.after - self.before


def paired_set_test(
    distance: PooledDistance,
    before: Sequence[npt.NDArray[np.intp]],
    after: Sequence[npt.NDArray[np.intp]],
    reference: npt.NDArray[np.intp],
    *,
    permutations: int,
    seed: int,
    clusters: Sequence[object] | None = None,
) -> PermutationResult:
    """Whether two systems lie equally far from the reference.

    Args:
        distance: of two sets of rows of one pool.
        before: rows of each picture of the first system, one or several (patches).
        after: the same of the second one; entry i has the prompt of `before[i]`.
        reference: rows of all reference pictures.
        permutations: at least 100.
        seed: of the exchanges.
        clusters: (n,) label of each pair; pairs of a cluster are exchanged together.

    Returns:
        `statistic` is the distance of the second system minus that of the first.

    Raises:
        ValueError: as `set_distance_permutation`, or other numbers of pictures.
    """
    # Sets of unequal size have unequal bias, which would pass for a difference.
    if len(before) != len(after):
        raise ValueError(f"pairs need equal numbers, got {len(before)} and {len(after)} pictures")
    # `after` first: the statistic of `set_distance_permutation` is first minus second.
    pictures = [*after, *before]

    def of(chosen: Rows) -> float:
        # A picture's patches move together: they are one observation.
        return distance(np.concatenate([pictures[place] for place in chosen]), reference)

    return set_distance_permutation(
        of, len(after), permutations=permutations, seed=seed, clusters=clusters
    )


def compare_sets(
    metric: SetMetric,
    before: Sequence[Features],
    after: Sequence[Features],
    reference: Features,
    *,
    permutations: int,
    seed: int,
    clusters: Sequence[object],
) -> dict[str, tuple[float, float, PermutationResult]]:
    """(distance of the first system, of the second one, test) by id, for ids that are distances.

    Args:
        metric: opened.
        before: features of each picture of the first system.
        after: of the second one, the same prompts in the same order.
        reference: (m, d), rows of all reference pictures.
        permutations: at least 100.
        seed: of the exchanges.
        clusters: (n,) label of each pair.

    Raises:
        SetsTooLarge: more than `MOST_ROWS` rows.
        ValueError: sets that are too small for the metric or for a test.
    """
    blocks = [*before, *after, reference]
    ends = np.cumsum([len(block) for block in blocks])
    total = int(ends[-1])
    # Before anything of that size is allocated.
    if total > MOST_ROWS:
        raise SetsTooLarge(
            f"{total} rows of features are more than the {MOST_ROWS} whose products a permutation "
            "test can hold; compare fewer pictures (--limit)"
        )
    # Where each picture's rows lie in the pool; none for a picture without a full patch.
    rows = np.split(np.arange(total), ends[:-1])
    ours, theirs, target = rows[: len(before)], rows[len(before) : -1], rows[-1]
    pool = np.concatenate(blocks)
    found = {}
    for metric_id, pooled in _distances(metric, pool).items():
        # Pooled metrics look this up in a matrix: a relabelling costs nothing of the features'
        # width.
        first = pooled(np.concatenate(ours), target)
        test = paired_set_test(
            pooled, ours, theirs, target, permutations=permutations, seed=seed, clusters=clusters
        )
        # The second distance is not computed again: the statistic is its difference to the first.
        found[metric_id] = (first, first + test.statistic, test)
    return found


def _distances(metric: SetMetric, pool: Features) -> dict[str, PooledDistance]:
    if isinstance(metric, PooledSetMetric):
        return metric.pooled(pool)

    # A function, not a lambda in the loop: each has to keep its own id.
    def by_combining(metric_id: str) -> PooledDistance:
        return lambda first, second: metric.combine(pool[first], pool[second])[metric_id]

    # Without a direction a number is no distance, such as the spread of one.
    wanted = [name for name in metric.ids if card(name).direction != "neither"]
    return {name: by_combining(name) for name in wanted}
