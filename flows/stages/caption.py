"""Stage `caption`: captions that came with the images, or that models write; all checked."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from components.corpus.captions.checks import PROVIDED, STATUSES, Judged, join_captions
from components.corpus.captions.provided import provided_captions
from components.corpus.manifest import read_table, write_table
from flows.stages.contract import StageContext, StageFailed, StageResult

_NAMED_IN_MESSAGES = 3


def _write(
    context: StageContext, manifest: pd.DataFrame, provided: list[Judged]
) -> tuple[list[Judged], float | None, list[str]]:
    """(every row's captions, models' ones included; USD spent; what failed)."""
    # The HTTP client is loaded only where there is an endpoint.
    from components.chat.client import EndpointUnusable
    from components.corpus.captions.models import write_captions
    from components.corpus.captions.writing import CaptioningStopped

    try:
        captioned = write_captions(
            manifest,
            provided,
            context.input("signals", "derivatives.parquet"),
            context.settings.caption,
            derivative_px=context.settings.signals.derivative_px,
            # Not below the state folder of one stage key: after a change of settings, answers to
            # questions that did not change are still there.
            cache=context.root / "runs" / "caption-requests.sqlite",
            root=context.root,
        )
    except (ValueError, EndpointUnusable, CaptioningStopped) as problem:
        raise StageFailed(f"caption: {problem}") from None
    return captioned.rows, captioned.spent_usd, captioned.problems


def run(context: StageContext) -> StageResult:
    """Write `data/caption/manifest.parquet`.

    Raises:
        StageFailed: captions file missing or wrong (with the line); endpoint of no use or cost cap
            reached (with what is left); or no row is left.
    """
    manifest = read_table(context.input("select", "manifest.parquet"))
    settings = context.settings.caption
    costs: dict[str, float] = {}
    problems: list[str] = []
    try:
        captions = provided_captions(manifest, context.settings.ingest, settings, context.root)
    except ValueError as problem:
        raise StageFailed(f"caption: {problem}") from None
    if "endpoint" in (settings.provider, settings.translate.provider):
        captions, spent_usd, problems = _write(context, manifest, captions)
        if spent_usd is not None:
            costs["cost_usd"] = spent_usd
    selected = manifest["kept"].eq(True)
    manifest = join_captions(manifest, captions, settings)
    path = context.output_dir / "manifest.parquet"
    write_table(manifest, path)

    kept = int(manifest["kept"].sum())
    origins = manifest.loc[manifest["kept"], "caption_model"].astype("string")
    provided = int(origins.str.startswith(PROVIDED).sum())
    lost = manifest[selected & ~manifest["kept"]]
    shared = int(manifest.loc[manifest["kept"], "caption_en"].duplicated(keep=False).sum())
    statuses = manifest.loc[selected, "caption_status"].value_counts()
    described = ", ".join(
        f"{Path(lost['uri'][index]).name}: {lost['caption_status'][index]}"
        for index in lost.index[:_NAMED_IN_MESSAGES]
    )
    if problems:
        described += f"; first error: {problems[0]}"
    if kept == 0:
        source = "caption.endpoint"
        if settings.provider == "shipped":
            is_folder = context.settings.ingest.kind == "folder"
            source = settings.file if is_folder else "the captions in ingest.source"
        raise StageFailed(
            f"caption: none of {int(selected.sum())} selected images has a usable caption "
            f"({described}); correct {source} or caption.min_words and max_words"
        )
    dropped = f", {len(lost)} without a usable caption ({described})" if len(lost) else ""
    return StageResult(
        metrics={
            "kept": float(kept),
            "provided": float(provided),
            # The same words for different pictures: a model that does not look, or a gallery.
            "shared_caption": float(shared),
            **{f"caption_{name}": float(statuses.get(name, 0)) for name in STATUSES},
            **costs,
        },
        datasets={"captioned": path},
        summary=f"{kept} captioned, {provided} of them by what came with the images{dropped}",
    )
