"""The two kinds of score that an image gets, and where each stands in a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Kind = Literal["quality", "aesthetic"]

SCORE_COLUMN: Mapping[Kind, str] = {"quality": "quality_score", "aesthetic": "aesthetic"}
"""Where a kind's number stands; its scorer and weights are `<kind>_scorer` and `<kind>_weights`."""
