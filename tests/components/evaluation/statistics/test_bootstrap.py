"""Known answers and properties of bootstrap means and paired differences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.evaluation.statistics.bootstrap import bootstrap_mean, paired_difference

values_lists = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30)


def test_interval_of_a_large_sample_matches_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 2000)
    estimate = bootstrap_mean(values, resamples=4000, seed=1)
    half_width = 1.96 * values.std() / np.sqrt(values.size)
    assert estimate.mean == pytest.approx(values.mean(), abs=1e-12)
    assert estimate.low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert estimate.high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)
    assert estimate.n == 2000


def test_coverage_is_close_to_nominal_over_many_samples() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for trial in range(300):
        estimate = bootstrap_mean(generator.normal(0, 1, 40), resamples=300, seed=trial)
        hits += estimate.low <= 0.0 <= estimate.high
    assert 0.90 <= hits / 300 <= 0.98


@settings(max_examples=40, deadline=None)
@given(values_lists)
def test_interval_contains_the_mean_of_resamples_range_and_is_ordered(values: list[float]) -> None:
    estimate = bootstrap_mean(values, resamples=200, seed=0)
    assert min(values) - 1e-9 <= estimate.low <= estimate.high <= max(values) + 1e-9


@settings(max_examples=40, deadline=None)
@given(values_lists, st.floats(-10, 10))
def test_a_constant_shift_is_found_exactly_by_pairs(values: list[float], shift: float) -> None:
    moved = [value + shift for value in values]
    estimate = paired_difference(values, moved, resamples=200, seed=0)
    for number in (estimate.mean, estimate.low, estimate.high):
        assert number == pytest.approx(shift, abs=1e-9)


def test_the_seed_decides_the_interval() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    first, again = (bootstrap_mean(values, resamples=500, seed=5) for _ in range(2))
    assert first == again
    assert first != bootstrap_mean(values, resamples=500, seed=6)


def test_memory_chunks_do_not_change_the_distribution_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.evaluation.statistics.bootstrap._CHUNK_VALUES", 7)
    estimate = bootstrap_mean([0.0, 1.0, 2.0], resamples=500, seed=0)
    assert 0.0 <= estimate.low < 1.0 < estimate.high <= 2.0


@pytest.mark.parametrize("values", [[], [1.0], [[1.0, 2.0]], [1.0, float("nan")]])
def test_too_few_or_unmeasured_values_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"at least 2 values|finite"):
        bootstrap_mean(values, resamples=200, seed=0)


def test_pairs_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="equal lengths, got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0], resamples=200, seed=0)
