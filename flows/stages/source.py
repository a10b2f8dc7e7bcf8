"""Stage `source`: what lies under `ingest.source`, file by file; runs whenever it is asked for."""

from __future__ import annotations

from components.corpus.listing.source_table import Described, describe_source
from components.engine.map_items import EngineLimits
from flows.stages.contract import StageContext, StageResult


def run(context: StageContext) -> StageResult:
    """Write `data/source/listing.parquet`: see `describe_source`.

    Raises:
        StageFailed: no usable source; the line names it and the setting.
    """
    settings = context.settings
    with context.failing(ValueError):
        found = describe_source(
            settings.ingest,
            context.output_dir / "listing.parquet",
            root=context.root,
            limits=EngineLimits.of(settings),
        )
    return StageResult(
        metrics={
            "files": float(found.files),
            "candidates": float(found.candidates),
            "read": float(found.read),
            "unusable": float(sum(found.unusable.values())),
        },
        summary=_summary(found, settings.ingest.kind),
    )


def _summary(found: Described, kind: str) -> str:
    what = f"{found.candidates} of {found.files} files are candidates"
    what = what if kind == "folder" else f"{found.files} files"
    worst = [f"{reason} ({number})" for reason, number in list(found.unusable.items())[:3]]
    return f"{what}, {found.read} read" + (f"; {', '.join(worst)}" if worst else "")
