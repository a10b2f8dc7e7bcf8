"""What a scorer is asked and what it answers; names and openers of all of them are in `scorers`.

`scoring` runs those that the settings name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pyarrow as pa

from components.corpus.derivatives import Derivative
from components.corpus.quality.kinds import SCORE_COLUMN, Kind
from components.engine.map_items import EngineLimits
from components.settings.schema import Settings

QUALITY_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        ("quality_score", pa.float64()),
        ("quality_scorer", pa.string()),
        ("quality_weights", pa.string()),
        ("aesthetic", pa.float64()),
        ("aesthetic_scorer", pa.string()),
        ("aesthetic_weights", pa.string()),
        # What the classical two are made of, each 0 to 1; null for all other scorers.
        ("sharpness", pa.float64()),
        ("cleanness", pa.float64()),
        ("exposure", pa.float64()),
        ("colourfulness", pa.float64()),
        ("contrast", pa.float64()),
        ("edge_compactness", pa.float64()),
        ("error", pa.string()),
    ]
)
"""Of the table that all scorers together make."""

# A model's first item pays for loading it, minutes for 8 billion parameters from a slow disk; CUDA
# reserves far more address space than it uses, so that a limit in MiB would only break it.
_MODEL_TIMEOUT_S = 1800.0
_MODEL_MEMORY_MB = 2**24


def score_schema(kind: Kind) -> pa.Schema:
    """Columns of a scorer that gives one kind of score."""
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            (SCORE_COLUMN[kind], pa.float64()),
            (f"{kind}_scorer", pa.string()),
            (f"{kind}_weights", pa.string()),
            ("error", pa.string()),
        ]
    )


def score_row(kind: Kind, score: float, scorer: str, weights: str | None = None) -> dict[str, Any]:
    """One image's row of `score_schema(kind)`.

    Args:
        kind: of the score.
        score: the number.
        scorer: name and version of what made it; scores of different names never mix.
        weights: sha256 of its weights, None for closed formulas.
    """
    return {SCORE_COLUMN[kind]: score, f"{kind}_scorer": scorer, f"{kind}_weights": weights}


@dataclass(frozen=True)
class ScoringJob:
    """What a scorer may look at when it is opened."""

    settings: Settings
    root: Path
    """Repository root; relative paths in the settings start here."""
    derivatives: Path
    """What the stage `signals` left."""


@dataclass(frozen=True)
class DerivativeScorer:
    """A function of one derivative, which the engine runs in worker processes."""

    function: Callable[[Derivative], dict[str, Any]]
    """Module-level, or a `functools.partial` of one; gives a row of `schema` without image_id."""
    schema: pa.Schema
    limits: EngineLimits
    key: Mapping[str, Any] = field(default_factory=dict)
    """What scores depend on beside code and picture (weights, device), JSON-able."""
    modules: Sequence[ModuleType] = ()
    """Further modules whose code makes the scores; the function's own is known."""
    outside: Sequence[type[Exception]] = ()
    """Exceptions that say nothing about the picture: no weights, no server."""

    @property
    def module(self) -> ModuleType:
        """Where the function stands: its name is the progress bar's, its source part of the key."""
        function = self.function.func if isinstance(self.function, partial) else self.function
        return sys.modules[function.__module__]


Opened = DerivativeScorer | pd.DataFrame
"""What runs over the derivatives, or scores that exist already: columns of `score_schema`."""


def model_limits(settings: Settings) -> EngineLimits:
    """Limits of a scorer that fills a good part of a GPU: one process per machine or actor."""
    limits = EngineLimits.for_networks(
        settings, timeout_s=_MODEL_TIMEOUT_S, memory_mb=_MODEL_MEMORY_MB
    )
    # Two copies of eight billion parameters do not fit where one does.
    return replace(limits, workers=1)


def server_limits(settings: Settings) -> EngineLimits:
    """Limits of a scorer behind a server, whose client has its own retries."""
    limits = EngineLimits.of(settings)
    return replace(
        limits,
        timeout_s=max(limits.timeout_s, _MODEL_TIMEOUT_S),
        memory_mb=max(limits.memory_mb, _MODEL_MEMORY_MB),
        retries=0,
    )


def formula(
    function: Callable[[Derivative], dict[str, Any]], job: ScoringJob, kind: Kind
) -> DerivativeScorer:
    """A scorer that is a function and nothing else: no weights, no server."""
    return DerivativeScorer(function, score_schema(kind), EngineLimits.of(job.settings))
