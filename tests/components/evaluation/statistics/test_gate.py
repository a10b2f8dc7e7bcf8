"""The promotion gate is a pure function of numbers and thresholds."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.evaluation.statistics.gate import decide
from components.settings.evaluation import PromoteSettings

SETTINGS = PromoteSettings(
    alias="candidate",
    min_vae_psnr_gain_db=3.0,
    min_validation_loss_drop=0.15,
    baseline=None,
    non_inferiority=(),
    significance=0.05,
    correction="holm",
    resamples=999,
)


def test_all_rules_met_promotes_with_margins() -> None:
    decision = decide(
        {"vae_psnr_gain_db": 4.5, "validation_loss_drop": 0.15}, SETTINGS, {"b": "2", "a": "1"}
    )
    assert decision["promoted"] is True
    assert [rule["margin"] for rule in decision["rules"]] == [1.5, 0.0]
    assert list(decision["digests"]) == ["a", "b"]


@given(st.floats(-10, 10), st.floats(-1, 1))
def test_promotion_is_the_conjunction_of_the_rules(gain: float, drop: float) -> None:
    decision = decide({"vae_psnr_gain_db": gain, "validation_loss_drop": drop}, SETTINGS)
    assert decision["promoted"] == (gain >= 3.0 and drop >= 0.15)
    assert len(decision["rules"]) == 2


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_missing_or_non_finite_number_never_promotes(value: float | None) -> None:
    decision = decide({"vae_psnr_gain_db": value, "validation_loss_drop": 0.5}, SETTINGS)
    assert decision["promoted"] is False
    assert decision["rules"][0]["value"] is None
    assert decision["rules"][0]["margin"] is None
    json.dumps(decision, allow_nan=False)


def test_an_absent_metric_fails_its_rule_only() -> None:
    decision = decide({"validation_loss_drop": 0.5}, SETTINGS)
    assert [rule["passed"] for rule in decision["rules"]] == [False, True]


BY_HEART = SETTINGS.model_copy(
    update={
        "min_validation_loss_drop": None,
        "min_training_images_loss_drop": 0.5,
        "min_twin_psnr_db": 18.0,
    }
)
LEARNED = {
    "vae_psnr_gain_db": 4.0,
    "validation_loss_drop": -1.6,
    "training_images_loss_drop": 0.5,
    "twin_psnr_db_worst": 18.0,
    "twins": 8.0,
    "twins_recognised": 8.0,
}


def test_a_run_that_memorises_is_judged_by_training_images_and_twins() -> None:
    decision = decide(LEARNED, BY_HEART)
    assert decision["promoted"] is True
    assert [rule["name"] for rule in decision["rules"]] == [
        "vae_psnr_gain_db",
        "training_images_loss_drop",
        "twin_psnr_db_worst",
        "twins_recognised",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("training_images_loss_drop", 0.49),
        ("twin_psnr_db_worst", 17.9),
        ("twins_recognised", 7.0),
        ("training_images_loss_drop", None),
        ("twin_psnr_db_worst", None),
        ("twins_recognised", None),
        ("twins", None),
        ("twins", math.nan),
    ],
)
def test_each_of_them_is_needed(name: str, value: float | None) -> None:
    assert decide({**LEARNED, name: value}, BY_HEART)["promoted"] is False
    without = {key: number for key, number in LEARNED.items() if key != name}
    assert decide(without, BY_HEART)["promoted"] is False


def test_a_run_without_twins_is_none_whose_twins_were_recognised() -> None:
    none = {key: value for key, value in LEARNED.items() if not key.startswith("twin")}
    decision = decide(none, BY_HEART)
    assert decision["promoted"] is False
    json.dumps(decision, allow_nan=False)
