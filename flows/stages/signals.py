"""Stage `signals`: every CPU signal of every candidate from one decode, and small derivatives."""

from __future__ import annotations

import pyarrow.parquet as pq

from components.corpus.candidate_signals import SIGNALS, measure_candidates
from components.corpus.manifest import read_table
from flows.stages.contract import StageContext, StageResult

_SUMMARISED = (
    "error",
    "integrity",
    "entropy_bits",
    "flat_fraction",
    "pdq_quality",
)


def run(context: StageContext) -> StageResult:
    """Write `data/signals/signals.parquet` and `data/signals/derivatives.parquet`.

    Raises:
        StageFailed: an original is not there, or cannot be read now.
    """
    columns = ("image_id", "uri", "integrity", "duplicate_of")
    manifest = read_table(context.input("ingest", "manifest.parquet"), columns)
    with context.failing(ValueError):
        measure_candidates(
            manifest,
            context.output_dir,
            context.settings,
            root=context.root,
            state_dir=context.state_dir,
        )
    path = context.output_dir / SIGNALS
    table = pq.read_table(path, columns=list(_SUMMARISED)).to_pandas()
    quarantined = int(table["error"].notna().sum())
    damaged = int((table["integrity"] != "ok").sum()) - quarantined
    return StageResult(
        metrics={
            "measured": float(len(table)),
            "quarantined": float(quarantined),
            "damaged": float(damaged),
            "mean_entropy_bits": float(table["entropy_bits"].mean()),
            "mean_flat_fraction": float(table["flat_fraction"].mean()),
            "mean_pdq_quality": float(table["pdq_quality"].mean()),
        },
        datasets={"signals": path},
        summary=f"{len(table)} measured, {damaged} damaged, {quarantined} quarantined",
    )
