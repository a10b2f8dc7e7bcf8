"""Scores made elsewhere, from the table that `quality.scores` names."""

from __future__ import annotations

import pandas as pd

from components.corpus.derivatives import derivative_ids
from components.corpus.external_scores import read_external_scores
from components.corpus.quality.kinds import SCORE_COLUMN, Kind
from components.corpus.quality.scorer import ScoringJob


def open_scorer(job: ScoringJob, kind: Kind) -> pd.DataFrame:
    """`kind`, its scorer and, where the table has them, its weights, one row per derivative.

    Raises:
        ValueError: see `read_external_scores`.
    """
    scores = job.settings.quality.scores
    assert scores is not None, "the settings refuse a scorer without what it needs"
    return read_external_scores(
        job.root / scores,
        derivative_ids(job.derivatives),
        [kind, f"{kind}_scorer"],
        setting="quality.scores",
        numeric=[kind],
        named=[f"{kind}_scorer"],
        optional=[f"{kind}_weights"],
    ).rename(columns={kind: SCORE_COLUMN[kind]})
