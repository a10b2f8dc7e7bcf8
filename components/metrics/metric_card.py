"""What a metric says of itself before anything is imported for it: its card, and how it opens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from components.metrics.metric import Metric
from components.metrics.metric_weights import Weights

Direction = Literal["higher", "lower", "neither"]

NATIVE = "native pixels"


@dataclass(frozen=True)
class MetricCard:
    """What a reader must know before comparing two numbers."""

    id: str
    """Key in `scores.parquet` and `metrics.json`."""
    name: str
    direction: Direction
    unit: str
    sees: str
    """What reaches the metric when the image is 4096 x 4096."""
    protocol: str
    """Changes whenever a change of the computation moves the number.

    It is part of a stored score's key, so an edit of its text measures everything again.
    """
    needs: Literal["image", "pair", "set pair", "prompt and image"]
    note: str = ""
    follows: str = ""
    """Paper and line, or released script, that the computation is of."""
    deviates: str = ""
    """What is not as there, or was not seen to be; empty where nothing is known."""
    weights: Weights | None = None
    decimals: int = 3
    """Digits after the point in tables."""
    fits_references: bool = False
    """Of set metrics: reference pictures are first brought to the size that was asked for, by
    their short side and a cut about the centre; else they are taken as they are."""

    @property
    def arrow(self) -> str:
        """Arrow as the papers print it."""
        return {"higher": "↑", "lower": "↓", "neither": ""}[self.direction]


Opener = Callable[[tuple[Path, ...], str, str], Metric]
"""(weights files in the order of their card, sha256 of all of them, device) -> the metric.

Called when the files are known to be there and right, so this is the place of heavy imports.
Without weights the files are () and the sha256 is "".
"""


@dataclass(frozen=True)
class MetricFamily:
    """Metrics that one pass over a picture yields together; a single metric is a family too."""

    cards: tuple[MetricCard, ...]
    """One per id, all with the same weights."""
    opener: Opener
    reads_weights: bool = True
    """False where another process holds the weights and this one only asks it."""
