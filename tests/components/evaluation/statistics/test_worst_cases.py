"""Worst cases: sign by direction, order, ties, and values that cannot be ranked."""

from __future__ import annotations

import math

import pandas as pd

from components.evaluation.statistics.worst_cases import by_rank, worst_cases


def table(metric: str, base: dict[str, float], mine: dict[str, float]) -> pd.DataFrame:
    rows = [("base", i, v) for i, v in base.items()] + [("mine", i, v) for i, v in mine.items()]
    frame = pd.DataFrame(rows, columns=["system", "item", "value"])
    return frame.assign(metric=metric)


def test_a_loss_is_a_fall_of_what_should_be_high_and_a_rise_of_what_should_be_low() -> None:
    base, mine = {"a": 5.0, "b": 5.0}, {"a": 4.0, "b": 7.0}
    high = worst_cases(table("psnr_db", base, mine), "base", "mine", ["psnr_db"], 3)
    assert [(c.item, c.loss) for c in high] == [("a", 1.0)]
    low = worst_cases(table("nmse", base, mine), "base", "mine", ["nmse"], 3)
    assert [(c.item, c.loss) for c in low] == [("b", 2.0)]
    neither = table("colourfulness", base, mine)
    assert worst_cases(neither, "base", "mine", ["colourfulness"], 3) == []


def test_the_largest_come_first_and_ties_in_order_of_item() -> None:
    base = dict.fromkeys("abcd", 9.0)
    mine = {"d": 7.0, "c": 5.0, "b": 7.0, "a": 8.0}
    found = worst_cases(table("psnr_db", base, mine), "base", "mine", ["psnr_db"], 3)
    assert [case.item for case in found] == ["c", "b", "d"]


def test_missing_values_and_two_infinite_ones_are_no_cases() -> None:
    base = {"a": math.inf, "b": math.nan, "c": 3.0, "only-base": 9.0}
    mine = {"a": math.inf, "b": 1.0, "c": math.nan, "only-mine": 1.0}
    assert worst_cases(table("psnr_db", base, mine), "base", "mine", ["psnr_db"], 3) == []


def test_infinite_losses_come_first_by_the_systems_own_value() -> None:
    base = dict.fromkeys("abc", math.inf) | {"d": 90.0}
    mine = {"a": 30.0, "b": 20.0, "c": 25.0, "d": 10.0}
    found = worst_cases(table("psnr_db", base, mine), "base", "mine", ["psnr_db"], 4)
    assert [case.item for case in found] == ["b", "c", "a", "d"]
    assert [case.loss for case in found] == [math.inf] * 3 + [80.0]


def test_ranks_alternate_between_metrics_and_name_an_item_once() -> None:
    base = dict.fromkeys("abc", 9.0)
    scores = pd.concat(
        [
            table("psnr_db", base, {"a": 1.0, "b": 2.0, "c": 3.0}),
            table("ssim", base, {"a": 3.0, "b": 2.0, "c": 1.0}),
        ]
    )
    cases = worst_cases(scores, "base", "mine", ["psnr_db", "ssim"], 3)
    assert [case.item for case in by_rank(cases)] == ["a", "c", "b"]


def test_an_item_is_named_for_every_system_that_loses_on_it() -> None:
    scores = table("psnr_db", {"a": 9.0}, {"a": 1.0})
    other = scores[scores["system"] == "mine"].assign(system="theirs", value=2.0)
    both = pd.concat([scores, other])
    cases = [
        case
        for system in ("mine", "theirs")
        for case in worst_cases(both, "base", system, ["psnr_db"], 3)
    ]
    assert [(case.system, case.item, case.loss) for case in by_rank(cases)] == [
        ("mine", "a", 8.0),
        ("theirs", "a", 7.0),
    ]
