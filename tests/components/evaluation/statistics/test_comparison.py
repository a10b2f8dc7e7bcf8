"""Paired comparisons of scores tables, and what they refuse."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from components.evaluation.statistics.bootstrap import cluster_sums, studentised_draws
from components.evaluation.statistics.comparison import (
    Comparison,
    ComparisonInvalid,
    PairedScores,
    Refusal,
    compare_systems,
    compared_means,
    paired_scores,
)
from components.evaluation.statistics.permutation import paired_permutation
from components.evaluation.statistics.scores import Score, scores_table

SIZES = ((128, 128), (96, 224))


def _table(shift: float, *, n: int = 12, metric: str = "psnr_db", seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    return scores_table(
        Score(f"{i:02}.png", "s", *size, metric, "p/v1", float(generator.normal(20.0)) + shift)
        for i in range(n)
        for size in SIZES
    )


def test_a_constant_gain_is_found_with_its_size_and_the_prompts_as_units() -> None:
    (found,) = compare_systems(_table(0.0), _table(0.5), ["psnr_db"], resamples=999, seed=0)
    assert isinstance(found, Comparison)
    assert found.difference.mean == pytest.approx(0.5)
    assert (found.difference.n, found.difference.clusters) == (24, 12)
    # Of 4,096 sign patterns two are as far out; of 4 * 999 draws none is, in that direction.
    assert found.p_value == 2 / 2**12 > 1 / (4 * 999 + 1)
    assert found.after - found.before == pytest.approx(0.5)


def test_a_prompt_column_makes_the_clusters() -> None:
    before, after = _table(0.0), _table(0.5)
    for table in (before, after):
        table["prompt"] = [name[:1] + str(int(name[:2]) // 2) for name in table["image"]]
    (found,) = compare_systems(before, after, ["psnr_db"], resamples=999, seed=0)
    assert isinstance(found, Comparison)
    assert found.difference.clusters == 6


def test_a_prompt_that_one_table_knows_counts_and_pictures_without_one_stand_alone() -> None:
    before, after = _table(0.0), _table(0.5)
    after["prompt"] = ["one" if name < "06" else None for name in after["image"]]
    for tables in ((before, after), (after, before), (after, after)):
        clusters = paired_scores(*tables, "psnr_db").clusters
        assert len(set(clusters)) == 1 + 6
        assert clusters.count("prompt one") == 12


def test_pictures_of_two_prompts_are_no_pair() -> None:
    before, after = _table(0.0).assign(prompt="a lake"), _table(0.5).assign(prompt="a hill")
    with pytest.raises(ComparisonInvalid, match="another prompt"):
        paired_scores(before, after, "psnr_db")


def test_holm_runs_over_the_metrics_that_could_be_compared() -> None:
    before = pd.concat([_table(0.0), _table(0.0, metric="ssim"), _table(0.0, metric="nmse", n=3)])
    after = pd.concat([_table(0.5), _table(0.1, metric="ssim"), _table(0.1, metric="nmse", n=3)])
    found = compare_systems(before, after, ["psnr_db", "ssim", "nmse"], resamples=999, seed=0)
    assert [type(one) for one in found] == [Comparison, Comparison, Refusal]
    assert isinstance(found[0], Comparison)
    assert found[0].adjusted_p == 2 * found[0].p_value
    assert isinstance(found[2], Refusal)
    assert found[2].reason == (
        "nmse: 3 independent prompts or images; an interval needs at least 6"
    )


def test_what_does_not_compare_is_refused_with_the_reason() -> None:
    table = _table(0.0)
    newer = table.assign(protocol="p/v2")
    with pytest.raises(ComparisonInvalid, match=r"protocols p/v1 and p/v2 do not compare"):
        paired_scores(table, newer, "psnr_db")
    with pytest.raises(ComparisonInvalid, match=r"1 pictures have no partner, such as 00.png"):
        paired_scores(table, table.iloc[1:], "psnr_db")
    with pytest.raises(ComparisonInvalid, match=r"two rows of 00.png at the same size"):
        paired_scores(pd.concat([table, table]), table, "psnr_db")
    with pytest.raises(ComparisonInvalid, match="the second system has no rows"):
        paired_scores(table, table.iloc[:0], "psnr_db")
    broken = table.copy()
    broken.loc[3, "value"] = float("nan")
    with pytest.raises(ComparisonInvalid, match=r"01.png is .* and nan; a value that is not"):
        paired_scores(table, broken, "psnr_db")
    broken["value"] = float("inf")
    with pytest.raises(ComparisonInvalid, match="inf and inf"):
        paired_scores(broken, broken, "psnr_db")


def test_pictures_that_neither_system_can_measure_are_counted_and_left_out() -> None:
    before, after = _table(0.0), _table(0.5)
    for table in (before, after):
        table.loc[table["image"] == "00.png", "value"] = float("nan")
    pairs = paired_scores(before, after, "psnr_db")
    assert (pairs.unmeasurable, pairs.differences.size) == (2, 22)


def _skewed_pairs(sign: float, seed: int) -> PairedScores:
    rng = np.random.default_rng(seed)
    before = rng.normal(size=24)
    after = before + sign * (rng.exponential(1.0, 24) - 1.0)
    return PairedScores("psnr_db", "x", before, after, tuple(map(str, range(24))), 0)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_skewed_differences_of_mean_zero_are_not_found_beyond_the_level(sign: float) -> None:
    level, trials, found, flipped = 0.01, 400, 0, 0
    for seed in range(trials):
        pairs = _skewed_pairs(sign, seed)
        found += compared_means(pairs, resamples=250, seed=seed)[1] < level
        signs = paired_permutation(pairs.before, pairs.after, permutations=999, seed=seed)
        flipped += signs.p_value < level
    # Flipping signs alone errs twice as often as it says.
    assert flipped / trials > 0.02
    assert found / trials <= 0.0125


def test_a_p_value_is_never_below_that_of_the_sign_flips() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=10)
    after = before + rng.normal(0.3, 1.0, 10)
    pairs = PairedScores("psnr_db", "x", before, after, tuple(map(str, range(10))), 0)
    signs = paired_permutation(before, after, permutations=400, seed=0)
    assert signs.exact
    assert compared_means(pairs, resamples=100, seed=0)[1] >= signs.p_value > 0.05


@pytest.mark.parametrize(("errors", "decided_by"), [(4.0, "direction"), (1.2, "printed")])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_p_value_is_the_largest_of_three(sign: float, errors: float, decided_by: str) -> None:
    """Against a loop over draws: 24 skewed differences whose mean lies on the short side."""
    rng = np.random.default_rng(5)
    skewed = rng.exponential(size=24)
    skewed -= skewed.mean()
    grouped = cluster_sums(skewed)
    values = sign * (skewed - errors * grouped.standard_error)
    pairs = PairedScores("psnr_db", "x", np.zeros(24), values, tuple(map(str, range(24))), 0)
    draws = studentised_draws(cluster_sums(values), resamples=4000, seed=3)
    pivot = values.mean() / grouped.standard_error

    def two_sided(gain: float) -> float:
        moved = []
        for number, draw in enumerate(draws):
            longer = draw + draws[len(draws) - 1 - number]
            grows = longer > 0.0 if number >= len(draws) // 2 else longer < 0.0
            moved.append(draw + gain / 24 * longer if grows else draw)
        above = sum(draw >= pivot for draw in moved)
        below = sum(draw <= pivot for draw in moved)
        return 2 * (min(above, below) + 1) / (len(draws) + 1)

    signs = paired_permutation(np.zeros(24), values, permutations=4000, seed=3).p_value
    p_values = {"signs": signs, "direction": two_sided(64.0) / 2}
    if two_sided(16.0) >= 0.05:
        p_values["printed"] = two_sided(16.0)
    largest = max(p_values, key=lambda name: p_values[name])
    assert largest == decided_by
    found = compared_means(pairs, resamples=1000, seed=3)[1]
    assert found == pytest.approx(p_values[largest], rel=1e-12)


def test_a_p_value_below_5_percent_stands_beside_an_interval_without_zero() -> None:
    below = outside = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        before = _table(0.0, n=20, seed=seed)
        gain = np.repeat(rng.lognormal(size=20) - 1.2, len(SIZES)) * (-1) ** seed
        after = before.assign(value=before["value"] + gain)
        (found,) = compare_systems(before, after, ["psnr_db"], resamples=100, seed=seed)
        assert isinstance(found, Comparison)
        leaves_out_zero = not found.difference.low <= 0.0 <= found.difference.high
        assert leaves_out_zero or found.p_value >= 0.05
        below += found.p_value < 0.05
        outside += leaves_out_zero
    assert 5 <= below <= outside < 60
