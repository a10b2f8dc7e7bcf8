"""Stage `quality`: a quality and an aesthetic score per image, with the names of the scorers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from components.corpus import quality
from components.corpus.derivatives import derivative_ids, score_derivatives
from components.corpus.engine import EngineLimits
from components.corpus.manifest import to_arrow
from components.corpus.parquet_files import write_parquet
from components.corpus.scores import read_external_scores
from flows.stages.contract import StageContext, StageFailed, StageResult


def _score_here(context: StageContext, derivatives: Path, path: Path) -> None:
    score_derivatives(
        quality.score_derivative,
        quality,
        quality.QUALITY_SCHEMA,
        derivatives=derivatives,
        derivative_px=context.settings.signals.derivative_px,
        destination=path,
        state_dir=context.state_dir / "shards",
        limits=EngineLimits.of(context.settings),
    )


def _take_from_table(context: StageContext, scores: str, derivatives: Path, path: Path) -> None:
    try:
        table = read_external_scores(
            context.root / scores,
            derivative_ids(derivatives),
            ["quality", "quality_scorer", "aesthetic", "aesthetic_scorer"],
            setting="quality.scores",
            numeric=["quality", "aesthetic"],
        )
    except ValueError as problem:
        raise StageFailed(f"quality: {problem}") from None
    table = table.rename(columns={"quality": "quality_score"})
    write_parquet(to_arrow(table, quality.QUALITY_SCHEMA), path)


def _mean(column: pd.Series) -> float:
    return float(column.mean()) if column.notna().any() else 0.0


def run(context: StageContext) -> StageResult:
    """Write `data/quality/quality.parquet`, one row per image that could be decoded.

    Raises:
        StageFailed: external scores that are missing or incomplete.
    """
    derivatives = context.input("signals", "derivatives.parquet")
    path = context.output_dir / "quality.parquet"
    scores = context.settings.quality.scores
    if context.settings.quality.scorer == "table" and scores is not None:
        _take_from_table(context, scores, derivatives, path)
    else:
        _score_here(context, derivatives, path)
    table = pq.read_table(path).to_pandas()
    scorers = sorted(
        {*table["quality_scorer"].dropna().unique(), *table["aesthetic_scorer"].dropna().unique()}
    )
    return StageResult(
        metrics={
            "scored": float(table["quality_score"].notna().sum()),
            "mean_quality_score": _mean(table["quality_score"]),
            "mean_aesthetic": _mean(table["aesthetic"]),
        },
        datasets={"quality": path},
        tags={"scorers": ", ".join(scorers)},
        summary=f"{len(table)} scored by {', '.join(scorers) or 'nothing'}",
    )
