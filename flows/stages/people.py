"""Stage `people`: evidence of people, the `character` tag and the channel of every image."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from components.corpus import people
from components.corpus.derivatives import derivative_ids, score_derivatives
from components.corpus.engine import EngineLimits
from components.corpus.manifest import to_arrow
from components.corpus.parquet_files import write_parquet
from flows.stages.contract import StageContext, StageFailed, StageResult


def _detect_here(context: StageContext, derivatives: Path, path: Path) -> None:
    score_derivatives(
        people.detect_people,
        people,
        people.PEOPLE_SCHEMA,
        derivatives=derivatives,
        derivative_px=context.settings.signals.derivative_px,
        destination=path,
        state_dir=context.state_dir / "shards",
        limits=EngineLimits.of(context.settings),
    )


def run(context: StageContext) -> StageResult:
    """Write `data/people/people.parquet`, one row per image that could be decoded.

    Raises:
        StageFailed: external boxes that are missing or incomplete.
    """
    derivatives = context.input("signals", "derivatives.parquet")
    path = context.output_dir / "people.parquet"
    settings = context.settings.people
    if settings.detector == "table" and settings.boxes is not None:
        try:
            table = people.people_from_table(
                context.root / settings.boxes, derivative_ids(derivatives), settings.min_score
            )
        except ValueError as problem:
            raise StageFailed(f"people: {problem}") from None
        write_parquet(to_arrow(table, people.PEOPLE_SCHEMA), path)
    else:
        _detect_here(context, derivatives, path)
    result = pq.read_table(path).to_pandas()
    characters = int(result["is_character"].eq(True).sum())
    scorers = ", ".join(sorted(result["person_scorer"].dropna().unique()))
    return StageResult(
        metrics={"looked_at": float(len(result)), "characters": float(characters)},
        datasets={"people": path},
        tags={
            "detector": scorers,
            "nsfw_score": "null: no classifier without weights in this version",
        },
        summary=f"{len(result)} looked at, people in {characters} ({scorers or 'nothing'})",
    )
