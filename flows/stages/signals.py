"""Stage `signals`: every CPU signal of every candidate from one decode, and small derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from components.corpus.manifest import read_table
from components.engine.map_items import EngineLimits, code_digest, join_shards, map_items
from components.images import decoding, image_containers
from components.images.original_lookup import OriginalLookup
from components.signals import candidate as signals
from components.signals import (
    entropy,
    flat_regions,
    fused_texture,
    glcm,
    jpeg_quality,
    pdq,
    shrinking,
)
from flows.stages.contract import StageContext, StageFailed, StageResult


def _refuse_unread(shards: Sequence[Path], names: dict[str, str]) -> None:
    """Fail when originals that ingest has read cannot be read now; their rows are forgotten.

    Such a row would say something of this moment's disk, while DVC would keep it for the manifest.
    """
    unread: list[str] = []
    for shard in shards:
        rows = pq.read_table(shard, columns=["image_id", "integrity"]).to_pandas()
        rows = rows[rows["integrity"].str.startswith(signals.UNREAD, na=False)]
        unread += [f"{names[row.image_id]}: {row.integrity}" for row in rows.itertuples()]
        if len(rows):
            shard.unlink()
    if unread:
        raise StageFailed(f"signals: {len(unread)} originals, the first is {unread[0]}")


def run(context: StageContext) -> StageResult:
    """Write `data/signals/signals.parquet` and `data/signals/derivatives.parquet`.

    One row per distinct readable image (duplicates share it), in manifest order. Files whose header
    could not be read are not opened again.
    """
    manifest = read_table(context.input("ingest", "manifest.parquet"))
    readable = manifest[(manifest["integrity"] == "ok") & manifest["duplicate_of"].isna()]
    settings = context.settings.signals
    try:
        originals = OriginalLookup(context.root).find_all(readable)
    except ValueError as problem:
        raise StageFailed(f"signals: {problem}") from None
    candidates = [
        signals.Candidate(
            path=original,
            patch_px=settings.patch_px,
            flat_variance=settings.flat_variance,
            derivative_px=settings.derivative_px,
            max_megapixels=context.settings.ingest.max_megapixels,
            glcm=settings.glcm,
        )
        for original in originals
    ]
    shards = map_items(
        signals.measure_candidate,
        readable["image_id"].tolist(),
        candidates,
        stage="signals",
        key={
            "patch_px": settings.patch_px,
            "flat_variance": settings.flat_variance,
            "derivative_px": settings.derivative_px,
            "max_megapixels": context.settings.ingest.max_megapixels,
            "glcm": settings.glcm,
            "kernels": signals.kernels_digest(),
            "code": code_digest(
                decoding,
                entropy,
                flat_regions,
                fused_texture,
                glcm,
                image_containers,
                jpeg_quality,
                pdq,
                shrinking,
                signals,
            ),
        },
        schema=signals.CANDIDATE_SCHEMA,
        state_dir=context.state_dir / "shards",
        limits=EngineLimits.of(context.settings),
    )
    _refuse_unread(shards, {original.image_id: original.name for original in originals})
    table_path = context.output_dir / "signals.parquet"
    join_shards(shards, signals.SIGNALS_SCHEMA, table_path)
    join_shards(shards, signals.DERIVATIVES_SCHEMA, context.output_dir / "derivatives.parquet")
    table = pq.read_table(table_path).to_pandas()
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
        datasets={"signals": table_path},
        summary=f"{len(table)} measured, {damaged} damaged, {quarantined} quarantined",
    )
