"""How often printed intervals hold what they claim to hold, and how often a page errs at all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from components.evaluation.statistics.bootstrap import mean_interval
from components.evaluation.statistics.permutation import paired_permutation
from components.evaluation.suites.against_baseline import LEVEL, against_baseline, verdict
from components.metrics.cards import card
from components.statistics.multiple_tests import holm

Generator = np.random.Generator
PER_PROMPT = 4
SHAPES: dict[str, tuple[Callable[[Generator, int], np.ndarray], float]] = {
    "normal": (lambda rng, k: rng.normal(0.0, 1.0, k), 0.0),
    "exponential": (lambda rng, k: rng.exponential(1.0, k), 1.0),
    "log-normal": (lambda rng, k: rng.lognormal(0.0, 0.5, k), float(np.exp(0.125))),
    "log-normal, 1": (lambda rng, k: rng.lognormal(0.0, 1.0, k), float(np.exp(0.5))),
    "skewed to the left": (lambda rng, k: -rng.lognormal(0.0, 1.0, k), -float(np.exp(0.5))),
    "heavy tails": (lambda rng, k: rng.standard_t(5, k), 0.0),
    "grades": (lambda rng, k: rng.choice(5, k, p=[0.05, 0.1, 0.2, 0.35, 0.3]), 2.75),
}


def coverage(
    shape: str, clusters: int, trials: int, *, by_prompt: bool = True, each: int = PER_PROMPT
) -> float:
    """Share of samples of `each` pictures a prompt whose 95% interval holds the mean."""
    draw, truth = SHAPES[shape]
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(clusters), each).tolist()
    hits = 0
    for trial in range(trials):
        values = np.repeat(draw(rng, clusters), each) + rng.normal(0, 0.25, len(labels))
        found = mean_interval(
            values, clusters=labels if by_prompt else None, resamples=499, seed=trial
        )
        hits += found.low <= truth <= found.high
    return hits / trials


@pytest.mark.parametrize("clusters", [8, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_intervals_over_prompts_cover_the_mean_as_often_as_they_say(
    shape: str, clusters: int
) -> None:
    assert 0.93 <= coverage(shape, clusters, 1500) <= 0.97


@pytest.mark.parametrize("shape", ["normal", "log-normal, 1"])
def test_intervals_cover_as_often_with_one_picture_a_prompt(shape: str) -> None:
    assert 0.93 <= coverage(shape, 8, 1500, each=1) <= 0.97


def test_intervals_over_pictures_would_cover_two_thirds() -> None:
    assert coverage("normal", 20, 500, by_prompt=False) < 0.75


def _page(rng: Generator, systems: int, metrics: list[str], prompts: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "system": f"s{system}",
            "item": f"i{prompt}",
            "image": f"i{prompt}.png",
            "height": 8,
            "width": 8,
            "metric": metric,
            "protocol": card(metric).protocol,
            "value": value,
            "prompt": f"p{prompt}",
        }
        for system in range(systems)
        for metric in metrics
        for prompt, value in enumerate(rng.normal(size=prompts))
    )


def test_families_of_equal_systems_err_on_one_page_in_twenty() -> None:
    rng = np.random.default_rng(1)
    pages, tests, wrong, uncorrected = 2000, 6, 0, 0
    for _ in range(pages):
        p_values = {
            str(number): paired_permutation(
                np.zeros(10), rng.normal(size=10), permutations=100, seed=0
            ).p_value
            for number in range(tests)
        }
        wrong += min(holm(p_values).values()) < LEVEL
        uncorrected += min(p_values.values()) < LEVEL
    assert 0.04 <= wrong / pages <= 0.06
    assert uncorrected / pages > 0.2


def test_holm_runs_over_all_systems_and_metrics_of_a_page() -> None:
    metrics = ["psnr_db", "ssim", "glcm_score"]
    table = _page(np.random.default_rng(1), 3, metrics, 10)
    found = against_baseline(table, ["s0", "s1", "s2"], "s0", resamples=100, seed=0)
    raw = {f"{one.system} {c.metric}": c.p_value for one in found for c in one.comparisons}
    assert len(raw) == 6
    expected = holm(raw)
    for one in found:
        for c in one.comparisons:
            assert c.adjusted_p == expected[f"{one.system} {c.metric}"]


def test_no_cell_says_no_difference_beside_an_interval_without_zero() -> None:
    assert verdict("psnr_db", 1.0, 0.2, (0.1, 1.9)) == "not after correction"
    assert verdict("psnr_db", 1.0, 0.2, (-0.1, 1.9)) == ""
    assert verdict("psnr_db", 1.0, 0.01, (0.1, 1.9)) == "better"
    assert verdict("nmse", 1.0, 0.01, (0.1, 1.9)) == "worse"
    assert verdict("psnr_db", 1.0, 0.01, (-0.1, 1.9)) == "undecided"
    assert verdict("colourfulness", 1.0, 0.01, (0.1, 1.9)) == "differs"
    assert verdict("psnr_db", 1.0, 0.01) == "better"
