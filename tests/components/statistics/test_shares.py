"""Wilson's interval: an independent reference, its bounds, and how often it holds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from components.statistics.shares import wilson_interval


@pytest.mark.parametrize(("wins", "n"), [(0, 5), (7, 7), (3, 8), (61, 195)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_it_is_scipys(wins: int, n: int, confidence: float) -> None:
    expected = binomtest(wins, n).proportion_ci(confidence, method="wilson")
    found = wilson_interval(wins / n, n, confidence)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
    if confidence == 0.95:
        assert wilson_interval(wins / n, n) == found


def test_seven_of_seven_is_not_certain() -> None:
    low, high = wilson_interval(1.0, 7)
    assert low == pytest.approx(0.646, abs=1e-3)
    assert high == 1.0


def test_shares_of_wins_and_of_ties_at_a_half_are_covered() -> None:
    rng = np.random.default_rng(0)
    for points in ([0.0, 1.0], [0.0, 0.5, 1.0]):
        hits = 0
        for _ in range(4000):
            share = float(rng.choice(points, 30).mean())
            low, high = wilson_interval(share, 30)
            hits += low <= 0.5 <= high
        assert hits / 4000 >= 0.93


def test_what_is_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 0 to 1"):
        wilson_interval(1.2, 3)
    with pytest.raises(ValueError, match="at least 1"):
        wilson_interval(0.5, 0)
