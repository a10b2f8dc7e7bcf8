"""Fréchet and kernel distances: closed forms, the textbook formula, and the permutation tests."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from components.metrics.networks.frechet import (
    GramFrechet,
    GramKernel,
    frechet_distance,
    kernel_distance,
    kernel_distance_spread,
)


def _with_moments(n: int, mean: np.ndarray, deviations: np.ndarray, seed: int) -> np.ndarray:
    """Rows whose sample mean and diagonal sample covariance are exactly those asked for."""
    rows = np.random.default_rng(seed).standard_normal((n, len(mean)))
    orthonormal, _ = np.linalg.qr(rows - rows.mean(axis=0))
    return orthonormal * np.sqrt(n - 1) * deviations + mean


def test_of_two_gaussians_it_is_the_closed_form() -> None:
    # Commuting covariances: squared distance of means plus squared distances of deviations.
    mean = np.array([1.0, -2.0, 0.5])
    x = _with_moments(50, np.zeros(3), np.array([1.0, 2.0, 3.0]), 1)
    y = _with_moments(70, mean, np.array([4.0, 0.5, 3.0]), 2)
    assert frechet_distance(x, y) == pytest.approx(5.25 + 9.0 + 2.25, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(40, 60), (9, 60), (60, 9), (7, 9)])
def test_it_equals_the_textbook_formula(n: int, m: int) -> None:
    generator = np.random.default_rng(3)
    x = generator.standard_normal((n, 12)) @ generator.standard_normal((12, 12))
    y = generator.standard_normal((m, 12)) @ generator.standard_normal((12, 12)) + 0.3
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    if min(n, m) > 12:
        root = scipy.linalg.sqrtm(s1 @ s2).real
        trace = np.trace(root)
    else:
        # sqrtm fails on singular matrices; the product has non-negative eigenvalues.
        trace = np.sqrt(np.maximum(scipy.linalg.eigvals(s1 @ s2).real, 0.0)).sum()
    difference = x.mean(axis=0) - y.mean(axis=0)
    expected = difference @ difference + np.trace(s1) + np.trace(s2) - 2 * trace
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6 if min(n, m) < 12 else 1e-9)


@given(st.integers(2, 30), st.integers(1, 40), st.integers(0, 99))
def test_a_set_has_no_distance_to_itself_in_any_order(n: int, d: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n, d))
    assert frechet_distance(x, generator.permutation(x)) == pytest.approx(0.0, abs=1e-10 * d)


@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 30), st.integers(0, 99))
def test_the_gram_matrix_gives_the_same_distance(n: int, m: int, d: int, seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((n + m, d)) + 5.0
    distance = GramFrechet(rows)(np.arange(n), np.arange(n, n + m))
    assert distance == pytest.approx(frechet_distance(rows[:n], rows[n:]), rel=1e-9, abs=1e-9)


@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 30), st.integers(0, 99))
def test_the_pool_gives_the_same_kernel_distance(n: int, m: int, d: int, seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((n + m, d))
    distance = GramKernel(rows)(np.arange(n), np.arange(n, n + m))
    assert distance == pytest.approx(kernel_distance(rows[:n], rows[n:]), rel=1e-9, abs=1e-9)


def test_kernel_distance_equals_the_plain_sum() -> None:
    generator = np.random.default_rng(7)
    x, y = generator.standard_normal((5, 4)), generator.standard_normal((6, 4)) + 0.5

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1) ** 3)

    own_x = np.mean([k(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    own_y = np.mean([k(y[i], y[j]) for i in range(6) for j in range(6) if i != j])
    cross = np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(own_x + own_y - 2 * cross, rel=1e-12)


def test_kernel_distance_is_unbiased_and_its_subsets_centre_on_it() -> None:
    generator = np.random.default_rng(8)
    values = [kernel_distance(*generator.standard_normal((2, 10, 5))) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20
    x, y = generator.standard_normal((60, 5)), generator.standard_normal((60, 5)) + 0.4
    mean, spread = kernel_distance_spread(x, y)
    assert spread > 0
    assert abs(mean - kernel_distance(x, y)) < 4 * spread / 10
    assert kernel_distance_spread(x, y) == (mean, spread)


def test_sets_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"n >= 2 pictures or patches, got \(1, 3\)"):
        frechet_distance(np.zeros((1, 3)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="widths differ: 3 and 4"):
        kernel_distance(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(np.full((2, 3), np.nan), np.zeros((4, 3)))


def test_an_extrapolated_distance_is_nearer_to_the_truth_than_the_plain_one() -> None:
    from components.metrics.networks.frechet import extrapolated_frechet_distance

    rng = np.random.default_rng(0)
    plain, corrected = [], []
    for _ in range(6):
        x = rng.standard_normal((80, 24))
        y = rng.standard_normal((80, 24)) + 0.5
        plain.append(frechet_distance(x, y))
        corrected.append(extrapolated_frechet_distance(x, y))
    # Equal covariances: the distance is that of the means, 24 times 0.25.
    assert abs(np.mean(corrected) - 6.0) < 0.25 * abs(np.mean(plain) - 6.0)
    with pytest.raises(ValueError, match="at least 16 pictures in both sets, got 10"):
        extrapolated_frechet_distance(rng.standard_normal((10, 4)), rng.standard_normal((80, 4)))
