"""Stage `quality`: a quality and an aesthetic score per image, with the names of the scorers."""

from __future__ import annotations

import pandas as pd
import pyarrow.parquet as pq

from components.corpus.quality.scoring import SCORING_REFUSED, score_photographs
from flows.stages.contract import StageContext, StageResult


def _mean(column: pd.Series) -> float:
    return float(column.mean()) if column.notna().any() else 0.0


def run(context: StageContext) -> StageResult:
    """Write `data/quality/quality.parquet`, one row per image that could be decoded.

    Raises:
        StageFailed: external scores that are missing or incomplete, weights that are not there, or
            a scorer server that does not answer.
    """
    derivatives = context.input("signals", "derivatives.parquet")
    path = context.output_dir / "quality.parquet"
    with context.failing(*SCORING_REFUSED):
        score_photographs(
            derivatives, path, context.settings, root=context.root, state_dir=context.state_dir
        )
    table = pq.read_table(path).to_pandas()
    scorers = sorted(
        {*table["quality_scorer"].dropna().unique(), *table["aesthetic_scorer"].dropna().unique()}
    )
    is_scored = table[["quality_score", "aesthetic"]].notna().all(axis=1)
    return StageResult(
        metrics={
            "scored": float(is_scored.sum()),
            "mean_quality_score": _mean(table["quality_score"]),
            "mean_aesthetic": _mean(table["aesthetic"]),
        },
        datasets={"quality": path},
        tags={"scorers": ", ".join(scorers)},
        summary=f"{is_scored.sum()} scored by {', '.join(scorers) or 'nothing'}"
        + _without(table["error"][~is_scored]),
    )


def _without(errors: pd.Series) -> str:
    """How many lack a score, and what is said of most of them."""
    if errors.empty:
        return ""
    reasons = errors.value_counts()
    most = f", most often: {reasons.index[0]}" if len(reasons) else ""
    return f"; {len(errors)} without both scores{most}"
