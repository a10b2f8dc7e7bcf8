"""Non-inferiority rules: direction, margins, Holm, refusals, and how often they are wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from components.evaluation.statistics.gate import decide
from components.evaluation.statistics.non_inferiority import baseline_scores, judge_non_inferiority
from components.evaluation.statistics.scores import Score, scores_table
from components.settings.evaluation import BaselineSettings, NonInferioritySettings, PromoteSettings

GOOD = {"vae_psnr_gain_db": 4.0, "validation_loss_drop": 0.5}


def _settings(*rules: tuple[str, float], **changes: Any) -> PromoteSettings:
    return PromoteSettings(
        alias="champion",
        min_vae_psnr_gain_db=3.0,
        min_validation_loss_drop=0.15,
        baseline=BaselineSettings(scores="b.parquet", sha256="0" * 64),
        non_inferiority=tuple(
            NonInferioritySettings(system="generated", metric=metric, margin=margin)
            for metric, margin in rules
        ),
        **({"significance": 0.05, "correction": "holm", "resamples": 1999} | changes),
    )


def _table(shifts: dict[str, float], *, n: int = 30, noise: float = 0.0) -> pd.DataFrame:
    generator, other = np.random.default_rng(0), np.random.default_rng(1)
    return scores_table(
        Score(
            f"{i:03}.png",
            "generated",
            64,
            64,
            metric,
            "p/v1",
            float(generator.normal(20.0)) + shift + noise * float(other.normal()),
        )
        for metric, shift in shifts.items()
        for i in range(n)
    )


def test_the_same_scores_are_not_inferior_at_any_margin() -> None:
    table = _table({"psnr_db": 0.0, "nmse": 0.0})
    decision = decide(
        GOOD, _settings(("psnr_db", 0.0), ("nmse", 0.0)), candidate=table, baseline=table
    )
    assert decision["promoted"] is True
    assert [rule["value"] for rule in decision["rules"][2:]] == [0.0, 0.0]
    assert decision["baseline"] == "0" * 64
    json.dumps(decision, allow_nan=False)


def test_a_gain_that_is_the_same_everywhere_is_no_loss() -> None:
    # But for rounding of their mean, which is no spread.
    table = _table({"psnr_db": 0.0}, n=20)
    decision = decide(
        GOOD,
        _settings(("psnr_db", 0.05)),
        candidate=table.assign(value=0.6),
        baseline=table.assign(value=0.5),
    )
    (*_, rule) = decision["rules"]
    assert (rule["passed"], rule["power"]) == (True, 1.0)
    assert rule["value"] == pytest.approx(0.1)
    json.dumps(decision, allow_nan=False)


def test_a_loss_above_the_margin_refuses_and_says_by_how_much() -> None:
    decision = decide(
        GOOD,
        _settings(("psnr_db", 0.5)),
        candidate=_table({"psnr_db": -0.8}, noise=0.1),
        baseline=_table({"psnr_db": 0.0}),
    )
    assert decision["promoted"] is False
    rule = decision["rules"][2]
    assert (rule["name"], rule["n"], rule["prompts"]) == ("generated.psnr_db", 30, 30)
    assert rule["margin"] == pytest.approx(rule["value"] + 0.5)
    assert -0.9 < rule["value"] < rule["improvement"] < -0.7
    assert "at most 0.5 may be lost" in rule["reason"]


@pytest.mark.parametrize(("correction", "level"), [("holm", 0.025), ("none", 0.05)])
def test_the_power_that_is_said_beforehand_is_at_the_hardest_level(
    correction: str, level: float
) -> None:
    table = _table({"psnr_db": 0.0, "ssim": 0.0}, n=12, noise=1.0)
    baseline = _table({"psnr_db": 0.0, "ssim": 0.0}, n=12)
    rules = _settings(("psnr_db", 0.4), ("ssim", 0.3), correction=correction)
    said: list[str] = []
    judge_non_inferiority(baseline, table, rules, 0, said.append)
    for line, metric, margin in zip(said, ("psnr_db", "ssim"), (0.4, 0.3), strict=True):
        after, before = (
            rows[rows["metric"] == metric]["value"].to_numpy() for rows in (table, baseline)
        )
        room = margin / stats.sem(after - before)
        power = stats.nct.sf(stats.t.isf(level, 11), 11, room)
        assert 0.2 < power < 0.95
        assert line == (
            f"generated.{metric}: with 12 prompts, a model as good as the baseline passes the "
            f"margin of {margin:g} in {power:.0%} of cases"
        )


def test_lower_is_better_turns_the_sign() -> None:
    lower, same = _table({"nmse": -1.0}, noise=0.1), _table({"nmse": 0.0})
    settings = _settings(("nmse", 0.2))
    (better,) = judge_non_inferiority(same, lower, settings, 0)
    (worse,) = judge_non_inferiority(lower, same, settings, 0)
    assert better["passed"]
    assert better["improvement"] == pytest.approx(1.0, abs=0.1)
    assert not worse["passed"]
    assert worse["improvement"] == pytest.approx(-1.0, abs=0.1)


def test_the_lower_bound_is_close_to_students() -> None:
    before = _table({"psnr_db": 0.0}, n=300)
    after = _table({"psnr_db": 0.1}, n=300, noise=0.5)
    (rule,) = judge_non_inferiority(before, after, _settings(("psnr_db", 0.0), resamples=19_999), 0)
    differences = after["value"].to_numpy() - before["value"].to_numpy()
    bound = differences.mean() - stats.t.ppf(0.95, 299) * stats.sem(differences)
    assert rule["value"] == pytest.approx(bound, abs=0.01)


@pytest.mark.parametrize("correction", ["holm", "none"])
def test_bound_and_p_value_agree(correction: str) -> None:
    shifts = {"psnr_db": -0.3, "ssim": -0.22, "nmse": 0.1}
    before = _table(dict.fromkeys(shifts, 0.0))
    settings = _settings(("psnr_db", 0.4), ("ssim", 0.4), ("nmse", 0.4), correction=correction)
    for noise in (0.1, 0.3, 0.5, 0.7):
        for rule in judge_non_inferiority(before, _table(shifts, noise=noise), settings, 0):
            assert rule["passed"] == (rule["p_value"] <= rule["level"])
            assert rule["passed"] == (rule["margin"] >= 0.0)


def test_holm_tests_the_clearest_rule_at_a_third_and_the_last_at_the_full_level() -> None:
    shifts = {"psnr_db": 0.0, "ssim": 0.1, "glcm_score": 0.2}
    rules = judge_non_inferiority(
        _table(dict.fromkeys(shifts, 0.0)),
        _table(shifts, noise=0.4),
        _settings(("psnr_db", 0.3), ("ssim", 0.3), ("glcm_score", 0.3)),
        0,
    )
    assert all(rule["passed"] for rule in rules)
    ordered = sorted(rules, key=lambda rule: rule["p_value"])
    assert [rule["level"] for rule in ordered] == pytest.approx([0.05 / 3, 0.05 / 2, 0.05])


def test_what_cannot_be_compared_fails_with_the_reason() -> None:
    table = _table({"psnr_db": 0.0, "glcm_entropy_bits": 0.0}, n=30)
    few = _table({"psnr_db": 0.0}, n=4)
    cases = [
        (few, few, "psnr_db", "at least 6 independent prompts"),
        (table, table.iloc[:-3], "psnr_db", "have no partner"),
        (table, table.assign(protocol="p/v2"), "psnr_db", "protocols p/v1 and p/v2"),
        (table, table, "ssim", "has no rows"),
    ]
    for before, after, metric, reason in cases:
        (rule,) = judge_non_inferiority(before, after, _settings((metric, 1.0)), 0)
        assert rule["passed"] is False
        assert reason in rule["reason"]
        assert rule["value"] is None


def test_too_few_resamples_for_the_level_never_pass() -> None:
    before, after = _table({"psnr_db": 0.0}), _table({"psnr_db": 9.0}, noise=0.1)
    (rule,) = judge_non_inferiority(
        before, after, _settings(("psnr_db", 1.0), resamples=100, significance=0.001), 0
    )
    assert not rule["passed"]
    assert "100 resamples are too few" in rule["reason"]


def test_without_a_baseline_the_rules_are_named_as_not_compared() -> None:
    decision = decide(GOOD, _settings(("psnr_db", 0.5)))
    assert decision["promoted"] is True
    assert decision["baseline"] is None
    assert decision["not_compared"] == ["generated.psnr_db"]


def test_a_truly_inferior_model_passes_no_more_often_than_the_level() -> None:
    settings = _settings(("psnr_db", 0.5), resamples=199)
    generator = np.random.default_rng(7)
    base = _table({"psnr_db": 0.0}, n=20)
    passed = 0
    for seed in range(100):
        worse = base.assign(value=base["value"] - 0.5 + generator.normal(0.0, 1.0, 20))
        (rule,) = judge_non_inferiority(base, worse, settings, seed)
        passed += rule["passed"]
    assert passed / 100 <= 0.1


def test_pictures_of_a_prompt_are_one_observation_of_it() -> None:
    settings = _settings(("psnr_db", 0.5))
    once = [table.assign(prompt=table["image"]) for table in _noisy_pair(12)]
    thrice = [
        pd.concat([table.assign(image=f"{seed}-" + table["image"]) for seed in range(3)])
        for table in once
    ]
    (single,) = judge_non_inferiority(*once, settings, 0)
    (several,) = judge_non_inferiority(*thrice, settings, 0)
    assert (single["n"], single["prompts"]) == (12, 12)
    assert (several["n"], several["prompts"]) == (36, 12)
    for name in ("value", "p_value", "power", "detectable"):
        assert several[name] == pytest.approx(single[name], rel=1e-9), name


def _noisy_pair(n: int) -> list[pd.DataFrame]:
    """Scores of a baseline and of a candidate that differs at random."""
    return [_table({"psnr_db": 0.0}, n=n), _table({"psnr_db": 0.0}, n=n, noise=1.0)]


def test_a_baseline_is_read_only_with_the_digest_that_the_settings_hold(tmp_path: Path) -> None:
    table = _table({"psnr_db": 0.0})
    table.to_parquet(tmp_path / "b.parquet", index=False)
    digest = hashlib.sha256((tmp_path / "b.parquet").read_bytes()).hexdigest()
    good = BaselineSettings(scores="b.parquet", sha256=digest)
    pd.testing.assert_frame_equal(baseline_scores(tmp_path, good), table)
    with pytest.raises(ValueError, match=r"b.parquet has sha256 .*restore the file"):
        baseline_scores(tmp_path, BaselineSettings(scores="b.parquet", sha256="0" * 64))
    with pytest.raises(ValueError, match=r"promote.baseline.scores = c.parquet: no such file"):
        baseline_scores(tmp_path, BaselineSettings(scores="c.parquet", sha256=digest))
