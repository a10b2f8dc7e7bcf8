"""Permutation tests of paired systems.

A p-value here is exact under its null hypothesis whatever the distribution of the scores: signs of
paired differences, or the two pictures of a prompt, are exchangeable when the systems are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from components.evaluation.statistics.bootstrap import cluster_sums

Alternative = Literal["two-sided", "greater", "less"]
Rows = npt.NDArray[np.int64]

EXACT_CLUSTERS = 16
"""Up to 2^16 sign patterns are enumerated."""
_TOLERANCE = 1e-9
"""Relative: permutations that tie with the observed value must not be lost to rounding."""
_CHUNK_VALUES = 2_000_000


@dataclass(frozen=True)
class PermutationResult:
    """What a permutation test says."""

    statistic: float
    """Observed value."""
    p_value: float
    permutations: int
    exact: bool
    """Whether all permutations were enumerated (p = count / total) or drawn at random, where
    p = (count + 1) / (drawn + 1) keeps the test valid (Phipson and Smyth 2010)."""
    n: int
    clusters: int


# A page's metrics and systems share prompts and seed, and so these patterns.
@lru_cache(maxsize=1)
def _signs(clusters: int, permutations: int, seed: int, exact: bool) -> npt.NDArray[np.bool_]:
    """(permutations, clusters); True: the pair is swapped."""
    if exact:
        # Pattern 0 swaps nothing, so an exact p counts the observed value and is never 0.
        patterns = np.arange(2**clusters, dtype=np.uint32)
        # Column c is bit c of the pattern's number: each of the 2^k patterns stands once.
        bits = np.arange(clusters, dtype=np.uint32)
        return ((patterns[:, None] >> bits) & 1).astype(bool)
    # A byte for each sign; int64 would take eight.
    drawn = np.random.default_rng(seed).integers(0, 2, (permutations, clusters), dtype=np.int8)
    return drawn.astype(bool)


def _p_value(
    observed: float, values: npt.NDArray[np.float64], alternative: Alternative, exact: bool
) -> float:
    # The pattern that swaps nothing and its mirror image have the observed value up to the order of
    # summation; losing them would make p smaller than it can be.
    slack = _TOLERANCE * max(abs(observed), float(np.abs(values).max(initial=0.0)))
    # Absolute values hold both tails: flipping all signs mirrors every value, so nothing is
    # doubled.
    if alternative == "two-sided":
        extreme = np.abs(values) >= abs(observed) - slack
    elif alternative == "greater":
        extreme = values >= observed - slack
    else:
        extreme = values <= observed + slack
    count = int(np.count_nonzero(extreme))
    # Drawn patterns may miss the observed one, so it is counted in.
    return count / values.size if exact else (count + 1) / (values.size + 1)


def _check_permutations(permutations: int) -> None:
    if permutations < 100:
        raise ValueError(f"permutations {permutations} must be at least 100")


def paired_permutation(
    before: Sequence[float] | npt.ArrayLike,
    after: Sequence[float] | npt.ArrayLike,
    *,
    permutations: int,
    seed: int,
    clusters: Sequence[object] | None = None,
    alternative: Alternative = "two-sided",
) -> PermutationResult:
    """Sign-flip test of mean(after - before) = 0 (Fisher's randomisation test).

    Args:
        before: (n,) values of the first system.
        after: (n,) values of the second one, same pictures in the same order.
        permutations: random sign patterns, at least 100, where there are more than
            `EXACT_CLUSTERS` clusters; fewer clusters are enumerated.
        seed: of the random patterns.
        clusters: (n,) labels; all differences of a cluster change sign together.
        alternative: "greater": after is above before.

    Raises:
        ValueError: unequal lengths, n < 2, one cluster, values that are not finite.
    """
    _check_permutations(permutations)
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal lengths, got {first.size} and {second.size}")
    grouped = cluster_sums(second - first, clusters)
    n = int(grouped.sizes.sum())
    # Back from deviations to differences: signs are flipped about zero, the null hypothesis, and
    # not about the mean.
    sums = grouped.sums + grouped.centre * grouped.sizes
    # Enumerating costs one sum per pattern, so it is taken wherever patterns fit into memory.
    exact = grouped.clusters <= EXACT_CLUSTERS
    total = 2**grouped.clusters if exact else permutations
    # Sums of clusters suffice: a pattern flips a cluster as a whole, so n does not matter here.
    swapped = _signs(grouped.clusters, total, seed, exact)
    rows = max(1, _CHUNK_VALUES // grouped.clusters)
    values = np.concatenate(
        [
            sums.sum() - 2.0 * (swapped[start : start + rows] @ sums)
            for start in range(0, total, rows)
        ]
    )
    p = _p_value(float(sums.sum()), values, alternative, exact)
    return PermutationResult(float(sums.sum()) / n, p, total, exact, n, grouped.clusters)


def set_distance_permutation(
    distance: Callable[[Rows], float],
    n: int,
    *,
    permutations: int,
    seed: int,
    clusters: Sequence[object] | None = None,
    alternative: Alternative = "two-sided",
) -> PermutationResult:
    """Whether two systems lie equally far from a reference set, prompt by prompt exchanged.

    For FID, KID and their kind, which have no value per picture: under the null hypothesis the two
    pictures of a prompt may be swapped between the systems, so distance(first) - distance(second)
    is compared with its values under swaps. The bias of FID at small n is the same on both sides.

    Args:
        distance: of a set from the reference, given (n,) row numbers into the features of both
            systems one below the other: rows 0 to n - 1 the first system, n to 2 n - 1 the second,
            same prompts in the same order.
        n: pictures of each system.
        permutations: random swaps, at least 100, where there are more clusters than can be
            enumerated in as many.
        seed: of the swaps.
        clusters: (n,) labels of pictures that are swapped together.
        alternative: "less": the first system is nearer.

    Raises:
        ValueError: n < 2, one cluster, or a distance that is not finite.
    """
    _check_permutations(permutations)
    if n < 2:
        raise ValueError(f"a comparison of sets needs at least 2 pictures of each, got {n}")
    labels = list(range(n)) if clusters is None else list(clusters)
    if len(labels) != n:
        raise ValueError(f"{n} pictures need as many cluster labels, got {len(labels)}")
    numbers: dict[object, int] = {}
    codes = np.array([numbers.setdefault(label, len(numbers)) for label in labels])
    if len(numbers) < 2:
        raise ValueError("all pictures belong to one cluster: nothing can be exchanged")
    rows = np.arange(n, dtype=np.int64)

    def difference(swap: npt.NDArray[np.bool_]) -> float:
        first = np.where(swap, rows + n, rows)
        value = distance(first) - distance(np.where(swap, rows, rows + n))
        # NaN compares as not extreme: it would make p smaller without a sound.
        if not np.isfinite(value):
            raise ValueError(f"the distance of a set is not finite ({value})")
        return float(value)

    # Through the same function as the others, so that its rounding is theirs.
    observed = difference(np.zeros(n, dtype=bool))
    # Enumerated where that costs no more than drawing: each value is two distances of whole sets,
    # so the 2^16 of `EXACT_CLUSTERS` would take half an hour.
    exact = 2 ** len(numbers) <= permutations
    total = 2 ** len(numbers) if exact else permutations
    # `codes` repeats a cluster's sign for each of its pictures: a prompt moves as a whole.
    swaps = _signs(len(numbers), total, seed, exact)[:, codes]
    values = np.array([difference(swap) for swap in swaps])
    p = _p_value(observed, values, alternative, exact)
    return PermutationResult(observed, p, total, exact, n, len(numbers))
