"""Bradley-Terry with an order effect: closed forms, and recovery of known judges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from components.evaluation.statistics.bradley_terry import Judged, fit_bradley_terry


def _logistic(value: float) -> float:
    return float(1.0 / (1.0 + np.exp(-value)))


def _simulate(strength: dict[str, float], order: float, prompts: int, seed: int) -> list[Judged]:
    """Every ordered pair of systems on every prompt."""
    generator = np.random.default_rng(seed)
    return [
        Judged(
            first,
            second,
            float(generator.random() < _logistic(strength[first] - strength[second] + order)),
            f"p{prompt}",
        )
        for prompt in range(prompts)
        for first in strength
        for second in strength
        if first != second
    ]


def test_two_systems_have_a_closed_form() -> None:
    # a wins 30 of 40 when first and 20 of 40 when second: logits ln 3 and 0.
    judged = [Judged("a", "b", float(i < 30), f"p{i}") for i in range(40)]
    judged += [Judged("b", "a", float(i >= 20), f"p{i}") for i in range(40)]
    fitted = fit_bradley_terry(judged)
    lead = -fitted.strengths["b"].value
    assert lead + fitted.order.value == pytest.approx(np.log(3.0), abs=0.01)
    assert lead - fitted.order.value == pytest.approx(0.0, abs=0.01)


def test_known_strengths_and_a_known_position_bias_are_recovered() -> None:
    truth = {"a": 0.0, "b": 0.7, "c": -0.4}
    fitted = fit_bradley_terry(_simulate(truth, 0.9, 1500, seed=0))
    assert fitted.strengths["b"].value == pytest.approx(0.7, abs=0.12)
    assert fitted.strengths["c"].value == pytest.approx(-0.4, abs=0.12)
    assert fitted.order.value == pytest.approx(0.9, abs=0.1)
    assert (fitted.comparisons, fitted.prompts) == (9000, 1500)


def test_pure_position_bias_is_no_strength() -> None:
    judged = [Judged(*pair, 1.0, f"p{i}") for i in range(20) for pair in (("a", "b"), ("b", "a"))]
    fitted = fit_bradley_terry(judged)
    assert fitted.strengths["b"].value == pytest.approx(0.0, abs=1e-6)
    assert 3.0 < fitted.order.value < 50.0


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    hits = 0
    for seed in range(150):
        fitted = fit_bradley_terry(_simulate({"a": 0.0, "b": 0.5}, 0.5, 40, seed))
        hits += fitted.strengths["b"].low <= 0.5 <= fitted.strengths["b"].high
    assert 0.88 <= hits / 150 <= 1.0


def test_repeating_the_answers_of_a_prompt_adds_no_certainty() -> None:
    judged = _simulate({"a": 0.0, "b": 0.5}, 0.2, 60, seed=3)
    once, thrice = fit_bradley_terry(judged), fit_bradley_terry(judged * 3)
    width = once.strengths["b"].high - once.strengths["b"].low
    assert thrice.strengths["b"].high - thrice.strengths["b"].low == pytest.approx(width, rel=0.02)


def test_few_prompts_have_the_interval_of_their_number() -> None:
    # On 6 of 8 prompts a wins in both orders, on the others b: the lead is ln 3. Per prompt the
    # residuals are 2 (1 - e) or 2 e, e = 3/4, and the information is 2 * 8 e (1 - e): the variance
    # is 1 / (7 e (1 - e)), with 7 and not 8 for the prompts.
    judged = [Judged("a", "b", float(i < 6), f"p{i}") for i in range(8)]
    judged += [Judged("b", "a", float(i >= 6), f"p{i}") for i in range(8)]
    found = fit_bradley_terry(judged).strengths["b"]
    half = stats.t.ppf(0.975, 7) / np.sqrt(7 * 3 / 16)
    # The prior moves both by 0.3%.
    assert found.value == pytest.approx(-np.log(3.0), rel=0.01)
    assert found.high - found.value == pytest.approx(half, rel=0.01)
    assert found.value - found.low == pytest.approx(half, rel=0.01)


@pytest.mark.parametrize("repeats", [1, 3])
def test_answers_that_agree_to_the_last_one_keep_the_models_own_variance(repeats: int) -> None:
    # All ties: no residual, so the sandwich is 0. 20 prompts in both orders, each of variance 1/4,
    # and the prior of 10 logits; asking the same again tells nothing.
    pairs = (("a", "b"), ("b", "a"))
    judged = [Judged(*pair, 0.5, f"p{i}") for i in range(20) for pair in pairs] * repeats
    fitted = fit_bradley_terry(judged)
    half = stats.t.ppf(0.975, 19) / np.sqrt(40 / 4)
    for found in (fitted.strengths["b"], fitted.order):
        assert found.value == pytest.approx(0.0, abs=1e-9)
        assert (found.low, found.high) == pytest.approx((-half, half), rel=1e-3)


def test_nothing_to_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="0 systems over 0 prompts"):
        fit_bradley_terry([])
    with pytest.raises(ValueError, match="2 systems over 1 prompts"):
        fit_bradley_terry([Judged("a", "b", 1.0, "p")])
    with pytest.raises(ValueError, match="scores must lie"):
        fit_bradley_terry([Judged("a", "b", 2.0, "p"), Judged("a", "b", 0.0, "q")])
