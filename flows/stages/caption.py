"""Stage `caption`: captions that came with the images, or that models write; all checked."""

from __future__ import annotations

from components.corpus.captions.captioning import (
    CaptionedPhotographs,
    CaptioningRefused,
    asks_models,
    caption_photographs,
)
from components.corpus.manifest import read_table, write_table
from flows.stages.contract import StageContext, StageFailed, StageResult


def run(context: StageContext) -> StageResult:
    """Write `data/caption/manifest.parquet`.

    Raises:
        StageFailed: captions file missing or wrong (with the line); endpoint of no use or cost cap
            reached (with what is left); or no row is left.
    """
    selected = read_table(context.input("select", "manifest.parquet"))
    derivatives = context.root / "data" / "signals" / "derivatives.parquet"
    if asks_models(context.settings.caption):
        derivatives = context.input("signals", "derivatives.parquet")
    try:
        found = caption_photographs(selected, derivatives, context.settings, root=context.root)
    except CaptioningRefused as problem:
        raise StageFailed(f"caption: {problem}") from None
    path = context.output_dir / "manifest.parquet"
    write_table(found.manifest, path)
    if found.kept == 0:
        raise StageFailed(
            f"caption: none of {found.selected} selected images has a usable caption "
            f"({found.described_losses}); in {_source(context)}: {found.remedies}"
        )
    costs = {} if found.spent_usd is None else {"cost_usd": found.spent_usd}
    return StageResult(
        metrics={
            "kept": float(found.kept),
            "provided": float(found.provided),
            "shared_caption": float(found.sharing_a_caption),
            **{f"caption_{name}": float(number) for name, number in found.statuses.items()},
            **costs,
        },
        datasets={"captioned": path},
        summary=_summary(found),
    )


def _source(context: StageContext) -> str:
    """Where a person would correct the captions."""
    if context.settings.caption.provider != "shipped":
        return "caption.endpoint"
    is_folder = context.settings.ingest.kind == "folder"
    return context.settings.caption.file if is_folder else "the captions in ingest.source"


def _summary(found: CaptionedPhotographs) -> str:
    dropped = ""
    if found.lost:
        dropped = f", {len(found.lost)} without a usable caption ({found.described_losses})"
    return f"{found.kept} captioned, {found.provided} of them by what came with the images{dropped}"
