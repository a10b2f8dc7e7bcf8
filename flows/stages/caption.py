"""Stage `caption`: captions that came with the images, or that models write; all checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from components.corpus.captions.captioning import (
    CaptionedPhotographs,
    CaptioningRefused,
    asks_models,
    caption_photographs,
)
from components.corpus.captions.encoder_cuts import encoder_cuts
from components.corpus.manifest_columns import manifest_batches
from components.files.parquet_files import write_parquet
from components.files.whole_files import write_text
from components.models.text_lengths import as_json, describe
from flows.stages.contract import StageContext, StageFailed, StageResult

LOSSES_SCHEMA = pa.schema([("record", pa.string()), ("detail", pa.string())])
"""Lines and files that gave no caption, or one that had to be mended, and why."""


def run(context: StageContext) -> StageResult:
    """Write `data/caption/manifest.parquet`, what could not be used and what encoders will cut.

    Raises:
        StageFailed: captions file missing or of no use (with its first line); no such model,
            endpoint of no use or cost cap reached (with what is left); or no row is left.
    """
    selected = context.input("select", "manifest.parquet")
    derivatives = context.root / "data" / "signals" / "derivatives.parquet"
    # Only a model needs them; without one a clone can caption before it has measured.
    if asks_models(context.settings.caption):
        derivatives = context.input("signals", "derivatives.parquet")
    path = context.output_dir / "manifest.parquet"
    with context.failing(CaptioningRefused):
        found = caption_photographs(
            selected, derivatives, context.settings, path, root=context.root
        )
    losses = [{"record": loss.record, "detail": loss.detail} for loss in found.losses]
    losses_path = context.output_dir / "losses.parquet"
    write_parquet(pa.Table.from_pylist(losses, schema=LOSSES_SCHEMA), losses_path)
    # After the tables: they say of each photograph what its caption lacks.
    if found.kept == 0:
        raise StageFailed(
            f"caption: none of {found.selected} selected images has a usable caption "
            f"({found.described_losses}); in {_source(context)}: {found.remedies}"
        )
    cuts = encoder_cuts(_kept_captions(path), context.settings, context.root)
    write_text(context.output_dir / "text_lengths.json", json.dumps(as_json(cuts), indent=2) + "\n")
    costs = {} if found.spent_usd is None else {"cost_usd": found.spent_usd}
    return StageResult(
        metrics={
            "kept": float(found.kept),
            "provided": float(found.provided),
            "shared_caption": float(found.sharing_a_caption),
            "lines_lost": float(len(found.losses)),
            **{f"caption_{name}": float(number) for name, number in found.statuses.items()},
            **{f"captions_cut_{name.lower()}": float(one.cut) for name, one in cuts.items()},
            **costs,
        },
        datasets={"captioned": path, "caption_losses": losses_path},
        summary="; ".join(filter(None, [_summary(found), describe(cuts)])),
    )


def _kept_captions(manifest: Path) -> Iterator[str]:
    for batch in manifest_batches(manifest, ["kept", "caption_en"]):
        yield from batch.filter(batch["kept"])["caption_en"].to_pylist()


def _source(context: StageContext) -> str:
    """Where a person would correct the captions."""
    provider = context.settings.caption.provider
    if provider != "shipped":
        return f"caption.{'text' if provider == 'fixed' else provider}"
    if context.settings.ingest.kind == "folder":
        return f"{context.settings.caption.file} and text files beside the photographs"
    return "the captions in ingest.source"


def _summary(found: CaptionedPhotographs) -> str:
    parts = [f"{found.kept} captioned, {found.provided} of them by what came with the images"]
    if found.lost:
        parts.append(f"{found.lost} without a usable caption ({found.described_losses})")
    if found.losses:
        parts.append(
            f"{len(found.losses)} lines or files left out or mended (losses.parquet; first: "
            f"{found.losses[0]})"
        )
    return ", ".join(parts)
