"""Stage `caption`: captions that ship with the photographs, or that models write; all checked."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from components.corpus.captions import (
    STATUSES,
    Judged,
    join_captions,
    judge_shipped,
    read_captions,
)
from components.corpus.manifest import read_table, write_table
from components.corpus.sources import file_name, source_folder
from flows.stages.contract import StageContext, StageFailed, StageResult

_NAMED_IN_MESSAGES = 3


def _judge_shipped(context: StageContext, manifest: pd.DataFrame) -> list[Judged]:
    """Every row's shipped caption."""
    settings = context.settings.caption
    try:
        folder = source_folder(context.settings.ingest, context.root)
        files = manifest["uri"].map(lambda uri: file_name(uri, folder, context.root))
        captions = read_captions(folder / settings.file, set(files))
    except ValueError as problem:
        raise StageFailed(f"caption: {problem}") from None
    return [judge_shipped(captions.get(file), settings) for file in files]


def _write(context: StageContext, manifest: pd.DataFrame) -> tuple[list[Judged], float, list[str]]:
    """(every row's caption by models, USD spent, what failed)."""
    # The HTTP client is loaded only where there is an endpoint.
    from components.corpus.caption_client import EndpointUnusable
    from components.corpus.caption_models import write_captions
    from components.corpus.captioning import CaptioningStopped

    settings = context.settings.caption
    shipped = _judge_shipped(context, manifest) if settings.provider == "shipped" else None
    try:
        captioned = write_captions(
            manifest,
            shipped,
            context.input("signals", "derivatives.parquet"),
            settings,
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
    if "endpoint" in (settings.provider, settings.translate.provider):
        captions, costs["cost_usd"], problems = _write(context, manifest)
    else:
        captions = _judge_shipped(context, manifest)
    selected = manifest["kept"].eq(True)
    manifest = join_captions(manifest, captions, settings)
    path = context.output_dir / "manifest.parquet"
    write_table(manifest, path)

    kept = int(manifest["kept"].sum())
    lost = manifest[selected & ~manifest["kept"]]
    statuses = manifest.loc[selected, "caption_status"].value_counts()
    described = ", ".join(
        f"{Path(lost['uri'][index]).name}: {lost['caption_status'][index]}"
        for index in lost.index[:_NAMED_IN_MESSAGES]
    )
    if problems:
        described += f"; first error: {problems[0]}"
    if kept == 0:
        source = settings.file if settings.provider == "shipped" else "caption.endpoint"
        raise StageFailed(
            f"caption: none of {int(selected.sum())} selected images has a usable caption "
            f"({described}); correct {source} or caption.min_words and max_words"
        )
    dropped = f", {len(lost)} without a usable caption ({described})" if len(lost) else ""
    return StageResult(
        metrics={
            "kept": float(kept),
            **{f"caption_{name}": float(statuses.get(name, 0)) for name in STATUSES},
            **costs,
        },
        datasets={"captioned": path},
        summary=f"{kept} captioned{dropped}",
    )
