"""Stage `ingest`: bring in the photographs that `ingest.source` names, from disk or the web."""

from __future__ import annotations

from components.corpus.sources.collect import Collected, collect
from flows.stages.contract import StageContext, StageResult
from flows.stages.gate import check_manifest, joined


def run(context: StageContext) -> StageResult:
    """Write `data/ingest/`: see `collect`.

    The raw contract is checked last: contract_results.json, contract_report.html and
    contract_failed_rows.parquet.

    Raises:
        StageFailed: no usable source; the line names it and the setting. Or nothing could be had,
            or a critical expectation of the raw contract is violated.
    """
    settings = context.settings.ingest
    folder = context.output_dir
    # Lists and archives are read themselves; their table only says when they have changed.
    listing = context.input("source", "listing.parquet") if settings.kind == "folder" else None
    with context.failing(ValueError):
        found = collect(
            settings,
            folder,
            root=context.root,
            state_dir=context.state_dir,
            listing=listing,
            first=context.first,
        )
    manifest = folder / "manifest.parquet"
    datasets = {"candidates": manifest}
    if settings.kind != "folder":
        datasets["losses"] = folder / "losses.parquet"
    result = StageResult(
        metrics=_metrics(found),
        artifacts=(folder / "coverage.json",),
        datasets=datasets,
        summary=_summary(found, settings.kind),
    )
    checked = check_manifest(context, manifest, [context.settings.validation.raw], "contract_")
    return joined(result, checked)


def _metrics(found: Collected) -> dict[str, float]:
    return {
        "candidates": float(found.candidates),
        "kept": float(found.kept),
        "losses": float(sum(found.losses.values())),
        "unreadable": float(found.unreadable),
        "duplicates": float(found.duplicates),
        "megapixels": found.megapixels,
        **{f"lost_{cause}": float(number) for cause, number in found.losses.items()},
    }


def _summary(found: Collected, kind: str) -> str:
    remark = f"; {found.remark}" if found.remark else ""
    if kind == "folder":
        return (
            f"{found.candidates} candidates, {found.unreadable} unreadable, "
            f"{found.duplicates} duplicates{remark}"
        )
    lost = f", lost: {found.described_losses}" if found.losses else ""
    return f"{found.candidates} candidates, {found.kept} kept{lost}{remark}"
