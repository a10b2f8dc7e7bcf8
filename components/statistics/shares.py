"""Shares of a whole, such as a win rate, with an interval that knows its bounds."""

from __future__ import annotations

import math


def wilson_interval(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), within [0, 1] and never one point.

    Also of means of values in [0, 1], such as ties counted half: their variance is at most that of
    yes and no with the same mean, so the interval is then too wide rather than too narrow.

    Args:
        share: observed, 0 to 1.
        n: independent trials, at least 1.
        confidence: coverage in (0, 1).

    Raises:
        ValueError: a share outside [0, 1], or no trial.
    """
    from scipy.special import ndtri

    if not 0.0 <= share <= 1.0 or n < 1:
        raise ValueError(f"a share of {share} in {n} trials: expected 0 to 1 in at least 1")
    z = float(ndtri(0.5 + confidence / 2.0))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding must not lead out of the range, nor leave out the share itself at its ends.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
