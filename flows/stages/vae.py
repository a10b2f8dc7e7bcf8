"""Stage `vae`: decoder-only post-training of the base autoencoder on the high-detail slice."""

from __future__ import annotations

import json
from pathlib import Path

from components.corpus.manifest import read_table
from components.files.weight_folders import WeightsMissing, folder_digest
from components.images.decoding import ImageUndecodable
from components.images.original_lookup import Original, OriginalLookup
from components.training.distributed.supervision import TrainingRefused
from components.training.vae.crops import PhotographTooSmall
from components.training.vae.trainer import LossNotFinite
from components.training.vae.worker import VaeJob, run_job
from flows.stages.contract import StageContext, StageFailed, StageResult


def _photographs(context: StageContext, lookup: OriginalLookup, name: str) -> tuple[Original, ...]:
    """The images of one slice, ordered by id (the order decides which crop a number means)."""
    table = read_table(context.input("slices", f"{name}.parquet"))
    if table.empty:
        raise StageFailed(
            f"vae: data/slices/{name}.parquet is empty; relax the rules in `select` or add photos"
        )
    rows = table.drop_duplicates("image_id").sort_values("image_id")
    return tuple(lookup.find_all(rows))


def run(context: StageContext) -> StageResult:
    """Write `data/vae/`: `autoencoder/`, history.csv, metrics.json, crops, figures.

    Raises:
        StageFailed: training diverged, weights or originals are missing, or a slice is empty.
    """
    settings = context.settings
    try:
        lookup = OriginalLookup(context.root)
        training = _photographs(context, lookup, "vae")
        held_out = _photographs(context, lookup, "eval")
    except ValueError as problem:
        raise StageFailed(f"vae: {problem}") from None
    job = VaeJob(
        settings=settings.vae,
        autoencoder=settings.models.autoencoder,
        runtime=settings.runtime,
        seed=settings.project.seed,
        root=context.root,
        photographs=training,
        held_out=held_out,
        state_dir=context.state_dir,
        max_megapixels=settings.ingest.max_megapixels,
        export_dir=context.output_dir,
        metrics=context.metrics.path,
    )
    try:
        run_job(job)
    except (
        ImageUndecodable,
        LossNotFinite,
        PhotographTooSmall,
        TrainingRefused,
        WeightsMissing,
    ) as problem:
        raise StageFailed(f"vae: {problem}") from problem
    return _describe(context.output_dir, settings.vae.steps)


def _describe(folder: Path, steps: int) -> StageResult:
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return StageResult(
        metrics=metrics,
        artifacts=tuple(folder / name for name in ("crops.png", "curves.png", "history.csv")),
        tags={"weights.autoencoder": folder_digest(folder / "autoencoder")},
        summary=(
            f"{steps} steps, held-out PSNR {metrics['psnr_before_db']:.2f} -> "
            f"{metrics['psnr_after_db']:.2f} dB ({metrics['psnr_gain_db']:+.2f})"
        ),
    )
