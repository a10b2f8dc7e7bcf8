"""Two samples: known p-values, and what must not matter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, fisher_exact, ks_2samp

from components.statistics.two_samples import kolmogorov_smirnov, same_shares


def counts(*numbers: int) -> np.ndarray:
    return np.array(numbers)


def test_kolmogorov_smirnov_by_hand_and_by_scipy() -> None:
    # Of the 20 ways to deal six values to two hands two are apart altogether.
    size, p = kolmogorov_smirnov(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]))
    assert (size, p) == pytest.approx((1.0, 0.1))
    # One of eleven moved across one other: the case that was once called drift.
    eleven = np.arange(11.0)
    moved = eleven.copy()
    moved[4] += 1.5
    size, p = kolmogorov_smirnov(eleven, moved)
    assert (size, p) == pytest.approx((1 / 11, 1.0))
    rng = np.random.default_rng(0)
    for rows in ((30, 41), (12_000, 9_000)):
        a, b = rng.normal(size=rows[0]), rng.normal(0.03, 1, rows[1])
        expected = ks_2samp(a, b)
        assert kolmogorov_smirnov(a, b) == pytest.approx((expected.statistic, expected.pvalue))


def test_shares_by_hand() -> None:
    # Every cell expects 15 and differs by 5: chi-squared 4 * 25 / 15 with one degree of freedom.
    assert same_shares(counts(10, 20), counts(20, 10)) == pytest.approx(0.009823, abs=1e-6)
    expected = chi2_contingency([[50, 30, 20], [70, 40, 10]], correction=False).pvalue
    assert same_shares(counts(50, 30, 20), counts(70, 40, 10)) == pytest.approx(expected)


def test_few_counts_are_compared_with_all_tables_of_their_sums() -> None:
    # 2 of the 20 ways to deal three and three are as far apart; chi-squared would say 0.014.
    assert same_shares(counts(3, 0), counts(0, 3)) == pytest.approx(0.1, abs=0.015)
    for before, after in ((counts(8, 2), counts(3, 8)), (counts(1, 14), counts(6, 9))):
        exact = fisher_exact([before, after]).pvalue
        assert same_shares(before, after) == pytest.approx(exact, abs=0.02)
    # Eleven names against eleven others: no table of these sums looks any different.
    assert same_shares(np.repeat([1, 0], 11), np.repeat([0, 1], 11)) == 1.0


def test_where_there_is_nothing_to_compare_nothing_differs() -> None:
    for before, after in (((5, 0), (9, 0)), ((0, 0), (3, 4)), ((0,), (0,))):
        assert same_shares(counts(*before), counts(*after)) == 1.0


def test_equal_shares_are_called_different_as_rarely_as_promised() -> None:
    rng = np.random.default_rng(1)
    shares = [0.6, 0.2, 0.1, 0.05, 0.05]
    for rows in (8, 400):
        found = [
            same_shares(rng.multinomial(rows, shares), rng.multinomial(rows, shares))
            for _ in range(200)
        ]
        # 5% of 200 and three standard deviations.
        assert sum(p <= 0.05 for p in found) <= 10 + 3 * 3.1


@settings(max_examples=25, deadline=None)
@given(
    table=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_names_and_order_of_categories_do_not_matter(
    table: list[tuple[int, int]], seed: int
) -> None:
    before, after = np.array(table).T
    p = same_shares(before, after)
    assert 0 < p <= 1
    order = np.random.default_rng(seed).permutation(len(before))
    # Random tables are drawn anew for another order of equal columns.
    assert same_shares(before[order], after[order]) == pytest.approx(p, abs=0.03)
    assert same_shares(np.append(before, 0), np.append(after, 0)) == pytest.approx(p)


def test_thousands_of_rare_categories_take_no_minutes() -> None:
    rng = np.random.default_rng(2)
    before, after = rng.poisson(2, 5000), rng.poisson(2, 5000)
    assert same_shares(before, after) > 0.001
    # The rare ones count together: what is new in one sample is not overlooked for being scattered.
    common, scattered = np.full(50, 20), np.full(100, 4)
    expected = chi2_contingency([[20] * 50 + [400], [20] * 50 + [200]], correction=False).pvalue
    halved = np.where(np.arange(100) < 50, scattered, 0)
    found = same_shares(np.append(common, scattered), np.append(common, halved))
    assert 0.001 < found < 0.9
    assert found == pytest.approx(expected)
    # The commonest are compared by name: there the difference shows.
    assert same_shares(np.append(before, 900), np.append(after, 0)) < 0.001
