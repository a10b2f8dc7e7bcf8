"""Stopping early: textbook boundaries, false-positive rates by simulation, intervals that hold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from components.evaluation.statistics.sequential import (
    boundaries,
    drawn_order,
    look,
    look_sizes,
    paired_differences,
    spent,
)

PROMPTS, LOOKS = 120, 5
SIZES = look_sizes(PROMPTS, LOOKS)
EDGES = boundaries([size / PROMPTS for size in SIZES])


@pytest.mark.parametrize(
    ("looks", "published"),
    [
        (1, (1.9600,)),
        (2, (2.9626, 1.9686)),
        (3, (3.7103, 2.5114, 1.9930)),
        (4, (4.3326, 2.9631, 2.3590, 2.0141)),
        (5, (4.8769, 3.3569, 2.6803, 2.2898, 2.0310)),
    ],
)
def test_boundaries_are_those_of_the_tables(looks: int, published: tuple[float, ...]) -> None:
    found = boundaries([number / looks for number in range(1, looks + 1)])
    assert found == pytest.approx(published, abs=2e-4)


def test_the_spending_function_spends_all_at_the_end_and_next_to_nothing_early() -> None:
    assert spent(1.0, 0.05) == pytest.approx(0.05)
    assert spent(0.2, 0.05) < 1e-5
    with pytest.raises(ValueError, match="increase from above 0 to 1"):
        boundaries([0.5, 0.5, 1.0])
    with pytest.raises(ValueError, match="increase"):
        boundaries([0.5, 0.9])


def decisions(draw: str, shift: float, edges: tuple[float, ...], runs: int) -> list[int]:
    """At which look (from 1) each simulated evaluation decided; 0: never."""
    rng = np.random.default_rng(7)
    found = []
    for _ in range(runs):
        if draw == "normal":
            values = rng.normal(shift, 1.0, PROMPTS)
        else:
            values = rng.exponential(1.0, PROMPTS) - 1.0 + shift
        number = 0
        for place, size in enumerate(SIZES, start=1):
            if look(values[:size].tolist(), PROMPTS, place, edges[place - 1]).is_decided:
                number = place
                break
        found.append(number)
    return found


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_equal_systems_are_told_apart_at_the_level_and_no_more(draw: str) -> None:
    rate = np.mean([place > 0 for place in decisions(draw, 0.0, EDGES, 1500)])
    # 1,500 runs at 5%: a standard error of 0.56%.
    assert 0.033 <= rate <= 0.067
    naive = np.mean([place > 0 for place in decisions(draw, 0.0, (1.96,) * LOOKS, 400)])
    assert naive > 0.09


def test_a_clear_difference_is_decided_early_and_a_small_one_late() -> None:
    clear = decisions("normal", 1.0, EDGES, 200)
    assert min(clear) >= 1
    assert np.mean(clear) < 2.2
    small = decisions("normal", 0.3, EDGES, 200)
    assert np.mean([place > 0 for place in small]) > 0.7
    assert np.mean([place for place in small if place]) > 3.0


def test_the_repeated_interval_holds_the_difference_whenever_one_stops() -> None:
    rng = np.random.default_rng(3)
    held = []
    for _ in range(600):
        values = rng.normal(0.25, 1.0, PROMPTS)
        every = [
            look(values[:size].tolist(), PROMPTS, place, EDGES[place - 1])
            for place, size in enumerate(SIZES, start=1)
        ]
        held.append(all(one.low <= 0.25 <= one.high for one in every))
        for one in every:
            # What decides and the interval are one statement.
            assert one.is_decided == (not one.low <= 0.0 <= one.high)
    assert 0.925 <= np.mean(held) <= 0.975


def test_a_look_is_a_t_test_and_its_interval_that_of_the_boundarys_level() -> None:
    differences = np.array([0.2, -0.4, 0.9, 1.3, -0.1, 0.6, 0.0, 0.7])
    expected = stats.ttest_1samp(differences, 0.0)
    boundary = 2.5
    found = look(differences.tolist(), 40, 2, boundary)
    assert found.deviate == pytest.approx(stats.norm.isf(expected.pvalue / 2.0), rel=1e-9)
    interval = expected.confidence_interval(1.0 - 2.0 * stats.norm.sf(boundary))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert (found.prompts, found.of, found.number, found.is_decided) == (8, 40, 2, False)


def test_differences_without_spread_decide_where_they_are_not_zero() -> None:
    assert look([0.5] * 10, 20, 1, 4.9).is_decided
    nothing = look([0.0] * 10, 20, 1, 4.9)
    assert not nothing.is_decided
    assert (nothing.low, nothing.high) == (0.0, 0.0)
    far = look([1000.0 + place for place in range(40)], 40, 1, 1.96)
    assert far.is_decided


def test_looks_are_of_equal_groups_and_not_too_small() -> None:
    assert look_sizes(195, 5) == (39, 78, 117, 156, 195)
    with pytest.raises(ValueError, match=r"--looks 5: .* fewer than 8; at most 2"):
        look_sizes(20, 5)
    with pytest.raises(ValueError, match="at most 1"):
        look_sizes(3, 1)


def test_the_order_is_drawn_once_per_prompt_and_the_same_again() -> None:
    prompts = [f"prompt {number}" for number in range(50)]
    order = drawn_order([*prompts, *prompts], 0)
    assert sorted(order) == sorted(prompts)
    assert order == drawn_order(prompts[::-1], 0)
    assert order != prompts
    assert order != drawn_order(prompts, 1)


def test_differences_are_of_shared_prompts_and_finite() -> None:
    system, baseline = {"a": 3.0, "b": 5.0, "c": 1.0}, {"a": 1.0, "b": 1.0}
    assert paired_differences(system, baseline, ["b", "a", "c"]) == [4.0, 2.0]
    with pytest.raises(ValueError, match="infinite"):
        paired_differences({"a": float("inf")}, baseline, ["a"])
