"""Minimum detectable effect: textbook values, and simulated power."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from components.evaluation.statistics.power import minimum_detectable_effect, paired_power


def test_power_of_34_pairs_at_half_a_standard_deviation_is_the_textbook_value() -> None:
    # G*Power 3.1, paired t-test, two-sided: n = 34, dz = 0.5, alpha = 0.05 -> 0.8078.
    assert paired_power(0.5, 1 / np.sqrt(34), 33, 0.05) == pytest.approx(0.8078, abs=1e-4)
    assert paired_power(0.0, 1.0, 33, 0.05) == pytest.approx(0.05, abs=1e-12)


def test_the_detectable_effect_is_found_four_times_in_five() -> None:
    generator = np.random.default_rng(0)
    differences = generator.normal(7.0, 2.0, 25)
    effect = minimum_detectable_effect(differences)
    spread = differences.std(ddof=1)
    samples = generator.normal(effect, spread, (4000, 25))
    found = stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.02)


def test_more_prompts_see_smaller_effects_and_more_seeds_of_a_prompt_do_not() -> None:
    differences = np.random.default_rng(1).normal(0.0, 1.0, 40)
    few, many = (minimum_detectable_effect(differences[:n]) for n in (10, 40))
    assert many < few
    labels = np.repeat(np.arange(40), 3).tolist()
    repeated = minimum_detectable_effect(np.repeat(differences, 3), clusters=labels)
    assert repeated == pytest.approx(many, rel=1e-9)


def test_differences_without_spread_need_no_effect_and_bad_levels_are_refused() -> None:
    assert minimum_detectable_effect([1.0, 1.0, 1.0]) == 0.0
    with pytest.raises(ValueError, match="0 < alpha < power < 1"):
        minimum_detectable_effect([1.0, 2.0], power=0.01)
