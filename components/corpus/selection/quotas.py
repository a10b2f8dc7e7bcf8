"""Shares of a corpus: quotas that cut groups down, and stratified samples of a given size.

A selection can only leave rows out, so a group that has too few rows is brought to its minimum
share by making the whole corpus smaller. Both functions find sizes first (exact integers) and then
take the rows of each group with the smallest draws, which leaves every other distribution inside a
group as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Shares such as 0.3 * 10 must give 3 in floating point.
_ROUNDING = 1e-9


class QuotaInfeasible(ValueError):
    """No non-empty corpus has these shares; the message names the group and the setting."""


@dataclass(frozen=True)
class Share:
    """Bounds of one group's share of the corpus, 0 to 1."""

    name: str
    min_share: float = 0.0
    max_share: float = 1.0


def _largest_remainder(wanted: np.ndarray, total: int, capacity: np.ndarray) -> np.ndarray:
    """Integers near `wanted` that add up to `total`; ties go to the earlier group.

    Every wanted value is at most its capacity and they add up to `total`, up to rounding.
    """
    floor = np.minimum(np.floor(wanted + _ROUNDING).astype(np.int64), capacity)
    missing = total - int(floor.sum())
    # Stable, or equal remainders would be served in an order that numpy may change.
    order = np.argsort(-(wanted - floor), kind="stable")
    # Rounds, because a group that is full passes its turn on.
    while missing > 0:
        for group in order:
            if missing and floor[group] < capacity[group]:
                floor[group] += 1
                missing -= 1
    return floor


def quota_sizes(counts: Sequence[int], shares: Sequence[Share]) -> np.ndarray:
    """How many rows of each group the largest corpus within all bounds has.

    The total N is the largest for which integers n_g exist with
    min_share * N <= n_g <= max_share * N, n_g <= counts_g and sum n_g = N. The n_g start at the
    original proportions, are clipped to these bounds, and the difference to N is spread over the
    groups in proportion to the room that they have left (largest remainder).

    Args:
        counts: rows per group.
        shares: bounds per group; together they cover all rows.

    Returns:
        (G,) int64.

    Raises:
        QuotaInfeasible: only the empty corpus satisfies the bounds.
    """
    available = np.asarray(counts, dtype=np.int64)
    total = int(available.sum())
    if total == 0:
        return available
    # Every total at once, largest first. No bisection: rounded bounds can make a total impossible
    # between two possible ones.
    totals = np.arange(total, 0, -1, dtype=np.float64)
    low_sum, high_sum = np.zeros(total), np.zeros(total)
    possible = np.ones(total, dtype=bool)
    for count, share in zip(available, shares, strict=True):
        # The slack goes towards the bound: a product a hair above 3 asks for 3 rows and not for 4.
        low = np.ceil(share.min_share * totals - _ROUNDING)
        high = np.minimum(count, np.floor(share.max_share * totals + _ROUNDING))
        possible &= low <= high
        low_sum += low
        high_sum += high
    # Integers between the bounds add up to N exactly when N lies between the sums of bounds.
    possible &= (low_sum <= totals) & (totals <= high_sum)
    if not possible.any():
        scarce = [s.name for c, s in zip(available, shares, strict=True) if s.min_share > 0]
        raise QuotaInfeasible(
            f"no corpus of {total} rows satisfies the quotas (rows per group: "
            + ", ".join(f"{s.name} {c}" for c, s in zip(available, shares, strict=True))
            + f"); lower min_share of {', '.join(scarce) or 'no group'} or raise max_share"
        )
    # argmax finds the first True.
    size = int(totals[np.argmax(possible)])
    lows = np.array([s.min_share for s in shares])
    highs = np.array([s.max_share for s in shares])
    low = np.ceil(lows * size - _ROUNDING).astype(np.int64)
    high = np.minimum(available, np.floor(highs * size + _ROUNDING).astype(np.int64))
    sizes = np.clip(np.floor(available * (size / total)).astype(np.int64), low, high)
    missing = size - int(sizes.sum())
    # All grow or all shrink, and there is room enough: this total was found possible.
    room = high - sizes if missing > 0 else sizes - low
    if missing:
        step = _largest_remainder(room * (abs(missing) / room.sum()), abs(missing), room)
        sizes += step if missing > 0 else -step
    return sizes


def stratified_sizes(counts: Sequence[int], target: int) -> np.ndarray:
    """Proportional allocation of `target` rows to strata (largest remainder).

    Returns:
        (G,) int64 with sum min(target, sum of counts).
    """
    available = np.asarray(counts, dtype=np.int64)
    total = int(available.sum())
    if total <= target:
        return available
    # Proportions below the capacity by themselves, since the target is below the total.
    return _largest_remainder(available * (target / total), target, available)


def smallest_draws(
    groups: np.ndarray, draws: np.ndarray, sizes: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Take `sizes[g]` rows of each group g: those with the smallest draws, ties in row order.

    Args:
        groups: (N,) integers, the group of each row.
        draws: (N,) float64.
        sizes: rows to take per group.

    Returns:
        (N,) bool, which rows are taken; (G,) float64, the largest draw taken per group (NaN where
        none is).
    """
    wanted = np.asarray(sizes, dtype=np.int64)
    # The last key sorts first: by group, then by draw, then (lexsort is stable) by row.
    order = np.lexsort((draws, groups))
    starts = np.searchsorted(groups[order], np.arange(len(wanted)))
    rank = np.arange(len(groups)) - starts[groups[order]]
    inside = rank < wanted[groups[order]]
    taken = np.zeros(len(groups), dtype=bool)
    taken[order[inside]] = True
    border = np.full(len(wanted), np.nan)
    # A group that gives nothing has no last row; its index would be another group's.
    filled = wanted > 0
    border[filled] = draws[order[(starts + wanted - 1)[filled]]]
    return taken, border
