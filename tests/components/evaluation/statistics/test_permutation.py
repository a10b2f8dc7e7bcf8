"""Permutation tests against scipy and by hand; Holm by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from components.evaluation.statistics.permutation import (
    paired_permutation,
    set_distance_permutation,
)


def _pairs(n: int, shift: float, seed: int = 0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    before = generator.normal(0.0, 1.0, n)
    return before, before + generator.normal(shift, 1.0, n)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_small_samples_are_enumerated_and_equal_scipy(alternative: str) -> None:
    before, after = _pairs(10, 0.5)
    ours = paired_permutation(before, after, permutations=100, seed=0, alternative=alternative)
    reference = stats.permutation_test(
        (after, before),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        alternative=alternative,
        vectorized=True,
    )
    assert (ours.exact, ours.permutations) == (True, 1024)
    assert ours.statistic == pytest.approx(reference.statistic, rel=1e-12)
    assert ours.p_value == pytest.approx(reference.pvalue, rel=1e-12)


def test_the_smallest_p_value_of_n_pairs_is_known() -> None:
    result = paired_permutation([0.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], permutations=100, seed=0)
    assert result.p_value == 2 / 2**5
    assert result.statistic == 3.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("alternative", ["greater", "less"])
def test_rounding_separates_no_patterns_that_tie(sign: float, alternative: str) -> None:
    # 0.3 - 0.1 - 0.2 and its mirror image are 0 but for rounding; of the eight sums three lie on
    # either side of them.
    after = sign * np.array([0.3, -0.1, -0.2])
    result = paired_permutation(
        np.zeros(3), after, permutations=100, seed=0, alternative=alternative
    )
    assert result.p_value == 5 / 8


def test_large_samples_are_drawn_and_close_to_the_t_test() -> None:
    before, after = _pairs(60, 0.3, seed=4)
    result = paired_permutation(before, after, permutations=20_000, seed=1)
    assert not result.exact
    assert result.p_value == pytest.approx(stats.ttest_rel(after, before).pvalue, abs=0.01)


def test_a_drawn_p_value_is_never_zero() -> None:
    result = paired_permutation(np.zeros(40), np.ones(40), permutations=999, seed=0)
    assert result.p_value == 1 / 1000


def test_seeds_of_a_prompt_change_sign_together() -> None:
    # Eight pictures of two prompts: four sign patterns, two of them as extreme as the observed one.
    result = paired_permutation(
        np.zeros(8), np.ones(8), permutations=100, seed=0, clusters=["p"] * 4 + ["q"] * 4
    )
    assert (result.permutations, result.p_value, result.clusters) == (4, 0.5, 2)


def test_equal_systems_reject_as_often_as_the_level_says() -> None:
    p_values = [
        paired_permutation(*_pairs(12, 0.0, seed), permutations=100, seed=0).p_value
        for seed in range(400)
    ]
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.03)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=2, max_size=9))
def test_the_two_sided_test_does_not_care_which_system_is_first(
    pairs: list[tuple[float, float]],
) -> None:
    before, after = zip(*pairs, strict=True)
    there = paired_permutation(before, after, permutations=100, seed=0)
    back = paired_permutation(after, before, permutations=100, seed=0)
    assert there.p_value == back.p_value
    assert 0.0 < there.p_value <= 1.0


def _mean_distance(features: Any, reference: Any) -> Any:
    return lambda rows: float(np.square(features[rows].mean(axis=0) - reference).sum())


def test_a_set_distance_is_compared_by_swapping_the_pictures_of_a_prompt() -> None:
    generator = np.random.default_rng(0)
    near, far = generator.normal(0.0, 1.0, (12, 3)), generator.normal(2.0, 1.0, (12, 3))
    distance = _mean_distance(np.concatenate([near, far]), np.zeros(3))
    result = set_distance_permutation(distance, 12, permutations=5000, seed=0)
    assert result.exact
    assert result.statistic < 0.0
    assert result.p_value < 0.01
    same = _mean_distance(np.concatenate([near, near]), np.zeros(3))
    assert set_distance_permutation(same, 12, permutations=300, seed=0).p_value == 1.0


def test_a_linear_set_distance_is_the_paired_test() -> None:
    before, after = _pairs(9, 0.4, seed=2)
    pooled = np.concatenate([after, before])
    ours = set_distance_permutation(
        lambda rows: float(pooled[rows].mean()), 9, permutations=1000, seed=0
    )
    paired = paired_permutation(before, after, permutations=1000, seed=0)
    assert ours.p_value == paired.p_value
    assert ours.statistic == pytest.approx(paired.statistic)


def test_what_is_invalid_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="equal lengths, got 2 and 3"):
        paired_permutation([1.0, 2.0], [1.0, 2.0, 3.0], permutations=100, seed=0)
    with pytest.raises(ValueError, match="one cluster"):
        paired_permutation([1.0, 2.0], [1.0, 2.0], permutations=100, seed=0, clusters=["p", "p"])
    with pytest.raises(ValueError, match="at least 100"):
        paired_permutation([1.0, 2.0], [1.0, 2.0], permutations=1, seed=0)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        set_distance_permutation(lambda rows: 0.0, 1, permutations=100, seed=0)
    with pytest.raises(ValueError, match="not finite"):
        set_distance_permutation(lambda rows: float("nan"), 3, permutations=100, seed=0)
