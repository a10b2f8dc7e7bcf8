"""Bootstrap intervals with clusters: known answers, scipy as reference, properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from components.evaluation.statistics.bootstrap import (
    _bca_levels,
    cluster_sums,
    extended_draws,
    mean_interval,
    ratio_sums,
    studentised_draws,
    sums_interval,
    two_sided_p_value,
)

METHODS = ("percentile", "bca", "studentised", "extended")
SKEWED = np.random.default_rng(5).lognormal(0.0, 1.0, 40)
values_lists = st.lists(st.floats(-1e3, 1e3), min_size=8, max_size=20)


@pytest.mark.parametrize(("method", "name"), [("percentile", "percentile"), ("bca", "BCa")])
def test_intervals_agree_with_scipy(method: str, name: str) -> None:
    ours = mean_interval(SKEWED, resamples=20_000, seed=1, method=method)
    reference = stats.bootstrap(
        (SKEWED,), np.mean, n_resamples=20_000, method=name, rng=np.random.default_rng(2)
    ).confidence_interval
    width = reference.high - reference.low
    assert ours.low == pytest.approx(reference.low, abs=0.02 * width)
    assert ours.high == pytest.approx(reference.high, abs=0.02 * width)


def test_the_studentised_interval_of_normal_values_is_students() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 12)
    ours = mean_interval(values, resamples=40_000, seed=1)
    half = stats.t.ppf(0.975, 11) * stats.sem(values)
    assert ours.high - ours.low == pytest.approx(2 * half, rel=0.15)


def test_singleton_clusters_have_the_textbook_standard_error() -> None:
    assert cluster_sums(SKEWED).standard_error == pytest.approx(stats.sem(SKEWED), rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_repeating_every_value_adds_no_evidence_when_clustered(method: str) -> None:
    once = mean_interval(SKEWED, resamples=500, seed=3, method=method)
    labels = np.repeat(np.arange(SKEWED.size), 4).tolist()
    repeated = mean_interval(
        np.repeat(SKEWED, 4), clusters=labels, resamples=500, seed=3, method=method
    )
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high), rel=1e-9)
    assert (repeated.n, repeated.clusters) == (160, 40)


def test_ignoring_clusters_would_claim_too_much() -> None:
    labels = np.repeat(np.arange(SKEWED.size), 4).tolist()
    honest = mean_interval(np.repeat(SKEWED, 4), clusters=labels, resamples=500, seed=3)
    naive = mean_interval(np.repeat(SKEWED, 4), resamples=500, seed=3)
    assert naive.high - naive.low < 0.6 * (honest.high - honest.low)


@settings(max_examples=30, deadline=None)
@given(values_lists, st.floats(-50, 50), st.floats(0.1, 10))
def test_intervals_move_and_stretch_with_the_values(
    values: list[float], shift: float, scale: float
) -> None:
    if np.ptp(values) < 1.0:
        values = [*values, 10.0 + max(values)]
    for method in METHODS:
        plain = mean_interval(values, resamples=200, seed=0, method=method)
        moved = mean_interval(
            [scale * value + shift for value in values], resamples=200, seed=0, method=method
        )
        assert plain.low <= plain.high
        assert moved.mean == pytest.approx(scale * plain.mean + shift, abs=1e-6)
        assert moved.high - moved.low == pytest.approx(
            scale * (plain.high - plain.low), rel=1e-5, abs=1e-6
        )


@pytest.mark.parametrize("value", [2.5, 0.1, 28.1, 1e-300])
@pytest.mark.parametrize("clusters", [None, list("aabbccddeeffgg")])
def test_equal_values_have_an_interval_of_one_point(
    value: float, clusters: list[str] | None
) -> None:
    # As many as there are labels; means of equal prompts vary by rounding, too.
    values = [value, 3 * value] * 7 if clusters else [value] * 7
    for method in METHODS:
        estimate = mean_interval(values, clusters=clusters, resamples=100, seed=0, method=method)
        assert estimate.low == estimate.mean == estimate.high
        assert estimate.mean == pytest.approx(2 * value if clusters else value)


def test_equal_ratios_have_an_interval_of_one_point() -> None:
    below = np.array([1.0, 3.0, 7.0, 9.0, 11.0, 13.0, 17.0])
    grouped = ratio_sums(1.3 * below, below, list("abcdefg"))
    estimate = sums_interval(grouped, 7, resamples=100, seed=0)
    assert estimate.low == estimate.mean == estimate.high == pytest.approx(1.3)


def test_of_two_draws_that_face_each_other_the_farther_moves_out_by_16_kths() -> None:
    for values in (SKEWED, -SKEWED):
        grouped = cluster_sums(values)
        draws = studentised_draws(grouped, resamples=999, seed=1)
        found = extended_draws(grouped, resamples=999, seed=1)
        low, high = draws[25], draws[-26]
        gain = 16 / 40 * abs(low + high)
        farther = [low - gain, high] if -low > high else [low, high + gain]
        assert found[[25, -26]] == pytest.approx(farther, rel=1e-12)
        assert (np.diff(found) >= 0.0).all()


def test_the_printed_interval_is_that_of_the_extended_draws() -> None:
    grouped = cluster_sums(SKEWED)
    draws = extended_draws(grouped, resamples=999, seed=1)
    found = mean_interval(SKEWED, resamples=999, seed=1)
    expected = SKEWED.mean() - grouped.standard_error * draws[[-26, 25]]
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-12)
    plain = mean_interval(SKEWED, resamples=999, seed=1, method="studentised")
    assert found.low == pytest.approx(plain.low, rel=1e-12)
    assert found.high - SKEWED.mean() > 1.1 * (plain.high - SKEWED.mean())


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_two_sided_p_value_is_where_the_interval_ends_at_zero(sign: float) -> None:
    error = cluster_sums(SKEWED).standard_error
    for errors in (0.5, 1.0, 1.5):
        values = sign * (SKEWED - SKEWED.mean() + errors * error)
        grouped = cluster_sums(values)
        p = two_sided_p_value(grouped, extended_draws(grouped, resamples=9999, seed=1))
        assert 0.01 < p < 0.9
        # An end of the interval at confidence 1 - p lies within one order statistic of zero.
        ends = [
            mean_interval(values, resamples=9999, seed=1, confidence=1.0 - p + step)
            for step in (-4e-4, 4e-4)
        ]
        assert not ends[0].low <= 0.0 <= ends[0].high
        assert ends[1].low <= 0.0 <= ends[1].high


def test_no_difference_and_no_spread_has_a_p_value_of_1() -> None:
    grouped = cluster_sums([0.0] * 8)
    assert two_sided_p_value(grouped, extended_draws(grouped, resamples=100, seed=1)) == 1.0


def test_draws_without_spread_stay_infinite() -> None:
    few = cluster_sums([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    found = extended_draws(few, resamples=999, seed=0)
    assert not np.isnan(found).any()
    assert found[0] == -np.inf


def test_with_few_prompts_the_interval_is_students() -> None:
    values, labels = [1.0, 1.2, 4.0, 4.4, 2.0, 2.4], ["a", "a", "b", "b", "c", "c"]
    found = mean_interval(values, clusters=labels, resamples=100, seed=0)
    expected = stats.t.interval(
        0.95, 2, *(lambda m: (m.mean(), stats.sem(m)))(np.array([1.1, 4.2, 2.2]))
    )
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-12)


def test_a_ratio_of_sums_has_the_delta_methods_error() -> None:
    rng = np.random.default_rng(2)
    pixels = rng.uniform(1.0, 4.0, 400)
    compressed = pixels / rng.uniform(5.0, 15.0, 400)
    grouped = ratio_sums(pixels, compressed, list(range(400)))
    assert grouped.centre == pytest.approx(pixels.sum() / compressed.sum(), rel=1e-12)
    # Of the same ratio by the jackknife.
    left_out = (pixels.sum() - pixels) / (compressed.sum() - compressed)
    jackknife = np.sqrt(399 / 400 * np.square(left_out - left_out.mean()).sum())
    assert grouped.standard_error == pytest.approx(jackknife, rel=0.01)
    found = sums_interval(grouped, 400, resamples=2000, seed=0)
    assert found.high - found.low == pytest.approx(2 * 1.97 * jackknife, rel=0.1)
    equal = ratio_sums(pixels, np.ones(400), list(range(400)))
    assert equal.standard_error == pytest.approx(cluster_sums(pixels).standard_error, rel=1e-12)
    # Prompts of one to three pictures: residuals and denominators add up within each.
    prompts = rng.integers(0, 3, 400).cumsum()
    uneven = ratio_sums(pixels, compressed, list(prompts))
    of_prompt = {prompt: prompts == prompt for prompt in dict.fromkeys(prompts)}
    residuals = pixels - uneven.centre * compressed
    for found_here, values in ((uneven.sums, residuals), (uneven.sizes, compressed)):
        expected = [values[mask].sum() for mask in of_prompt.values()]
        assert found_here == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_bca_levels_are_numbers_where_all_draws_lie_on_one_side_or_the_pole_is_passed() -> None:
    grouped = cluster_sums(SKEWED)
    levels = np.array([0.025, 0.975])
    for means in (np.full(200, -1.0), np.full(200, 1.0)):
        corrected = _bca_levels(grouped, means, levels)
        assert np.isfinite(corrected).all()
        assert (np.diff(corrected) >= 0).all()
    extreme = cluster_sums([0.0] * 49 + [1e6])
    for means in (np.full(200, -1.0), np.full(200, 1.0), np.linspace(-1, 1, 200)):
        assert np.isfinite(_bca_levels(extreme, means, np.array([1e-9, 1 - 1e-9]))).all()


def test_the_seed_decides_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    first = mean_interval(SKEWED, resamples=300, seed=4)
    assert first == mean_interval(SKEWED, resamples=300, seed=4)
    monkeypatch.setattr("components.evaluation.statistics.bootstrap._CHUNK_VALUES", 1000)
    assert first == mean_interval(SKEWED, resamples=300, seed=4)


def test_what_is_invalid_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="at least 6 independent prompts or images, got 5"):
        studentised_draws(cluster_sums([1.0, 2.0, 3.0, 4.0, 5.0]), resamples=100, seed=0)
    with pytest.raises(ValueError, match=r"all 3 values belong to one cluster \('p'\)"):
        mean_interval([1.0, 2.0, 3.0], clusters=["p"] * 3, resamples=100, seed=0)
    with pytest.raises(ValueError, match="3 values need as many cluster labels, got 2"):
        mean_interval([1.0, 2.0, 3.0], clusters=["p", "q"], resamples=100, seed=0)
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, float("inf")], resamples=100, seed=0)
    with pytest.raises(ValueError, match="at least 100"):
        mean_interval([1.0, 2.0], resamples=99, seed=0)


def _coverage(method: str, clusters: int, per_cluster: int, trials: int) -> float:
    """Share of simulated log-normal samples whose 95% interval holds the true mean."""
    generator = np.random.default_rng(11)
    truth = float(np.exp(0.5))
    labels = np.repeat(np.arange(clusters), per_cluster).tolist()
    hits = 0
    for trial in range(trials):
        prompts = generator.lognormal(0.0, 1.0, clusters)
        values = np.repeat(prompts, per_cluster) * generator.uniform(0.5, 1.5, len(labels))
        estimate = mean_interval(values, clusters=labels, resamples=999, seed=trial, method=method)
        hits += estimate.low <= truth <= estimate.high
    return hits / trials


@pytest.mark.slow
@pytest.mark.parametrize("per_cluster", [1, 3])
def test_studentised_intervals_cover_skewed_means_best(per_cluster: int) -> None:
    covered = {method: _coverage(method, 20, per_cluster, 2000) for method in METHODS}
    assert 0.90 <= covered["studentised"] <= 0.97
    assert covered["percentile"] < covered["bca"] < covered["studentised"]
