"""Stage `people`: evidence of people, NSFW scores, the `character` tag and the channel."""

from __future__ import annotations

import pyarrow.parquet as pq

from components.corpus.manifest import read_table
from components.corpus.people.looking import LOOKING_REFUSED, look_for_people
from flows.stages.contract import StageContext, StageResult


def run(context: StageContext) -> StageResult:
    """Write `data/people/people.parquet`, one row per image that could be decoded.

    Raises:
        StageFailed: weights, or external boxes, that are missing or incomplete.
    """
    derivatives = context.input("signals", "derivatives.parquet")
    columns = ("image_id", "query", "source")
    manifest = read_table(context.input("ingest", "manifest.parquet"), columns)
    path = context.output_dir / "people.parquet"
    with context.failing(*LOOKING_REFUSED):
        look_for_people(
            derivatives,
            manifest,
            path,
            context.settings,
            root=context.root,
            state_dir=context.state_dir,
        )
    result = pq.read_table(path).to_pandas()
    characters = int(result["is_character"].eq(True).sum())
    human = int(result["channel"].eq("human").sum())
    scorers = ", ".join(sorted(result["person_scorer"].dropna().unique()))
    nsfw_scorers = ", ".join(sorted(result["nsfw_scorer"].dropna().unique()))
    return StageResult(
        metrics={
            "looked_at": float(len(result)),
            "characters": float(characters),
            "human_channel": float(human),
            "nsfw_scored": float(result["nsfw_score"].notna().sum()),
        },
        datasets={"people": path},
        tags={
            "detector": scorers,
            "nsfw_scorer": nsfw_scorers or "none: no score without a classifier",
        },
        summary=f"{len(result)} looked at, people in {characters} ({scorers or 'nothing'})",
    )
