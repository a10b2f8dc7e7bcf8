"""The shift of noise levels in flow matching: one formula for sampling and training.

sigma' = s sigma / (1 + (s - 1) sigma), s the shift (Esser et al. 2024, 2403.03206, equation 23). A
larger image keeps more of its signal at the same level, so that s grows with its size: FLUX.1 takes
s = exp(mu), mu on a line through (256 tokens, 0.5) and (4096 tokens, 1.15) that goes on beyond (its
scheduler's configuration; diffusers' `calculate_shift` and `time_shift`, tested equal). UltraFlux'
released sampling script takes s = 3 at every size.

No torch on import.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    Level = TypeVar("Level", float, Tensor)
else:
    Level = TypeVar("Level")

STATIC_SHIFT = 3.0
"""Of the released sampling script; its `time_shift = 4` is read by nothing."""
BASE_TOKENS, BASE_MU = 256, 0.5
LARGE_TOKENS, LARGE_MU = 4096, 1.15


def dynamic_shift(tokens: int) -> float:
    """S = exp(mu) for an image of so many tokens: 1.65 at 256, 3.16 at 4096, 25.4 at 16,384."""
    slope = (LARGE_MU - BASE_MU) / (LARGE_TOKENS - BASE_TOKENS)
    return math.exp(BASE_MU + slope * (tokens - BASE_TOKENS))


def shift_level(sigma: Level, shift: float) -> Level:
    """Noise level(s) in [0, 1] moved by a shift; 1 moves none, exactly."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def unshift_level(sigma: Level, shift: float) -> Level:
    """Inverse of `shift_level`."""
    return sigma / (shift - (shift - 1.0) * sigma)
