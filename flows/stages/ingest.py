"""Stage `ingest`: list, hash and probe the photographs that `ingest.source` names."""

from __future__ import annotations

from components.corpus.manifest import write_table
from components.corpus.sources import scan_folder
from flows.stages.contract import StageContext, StageFailed, StageResult


def run(context: StageContext) -> StageResult:
    """Write `data/ingest/manifest.parquet`, one row per candidate file.

    Raises:
        StageFailed: no usable source folder; the line names it and the setting.
    """
    try:
        manifest = scan_folder(context.settings.ingest, context.root)
    except ValueError as problem:
        raise StageFailed(f"ingest: {problem}") from None
    path = context.output_dir / "manifest.parquet"
    write_table(manifest, path)
    unreadable = int((manifest["integrity"] != "ok").sum())
    duplicates = int(manifest["duplicate_of"].notna().sum())
    megapixels = float(manifest["megapixels"].sum()) if "megapixels" in manifest else 0.0
    return StageResult(
        metrics={
            "candidates": float(len(manifest)),
            "unreadable": float(unreadable),
            "duplicates": float(duplicates),
            "megapixels": megapixels,
        },
        datasets={"candidates": path},
        summary=f"{len(manifest)} candidates, {unreadable} unreadable, {duplicates} duplicates",
    )
