"""Stage `vae`: decoder-only post-training of the base autoencoder on the high-detail slice."""

from __future__ import annotations

import json
from pathlib import Path

from components.files.weight_folders import WeightsMissing, folder_digest
from components.images.decoding import ImageUndecodable
from components.training.distributed.supervision import TrainingRefused
from components.training.vae.crops import PhotographTooSmall
from components.training.vae.job import slices_job
from components.training.vae.trainer import LossNotFinite
from components.training.vae.worker import run_job
from flows.stages.contract import StageContext, StageFailed, StageResult


def run(context: StageContext) -> StageResult:
    """Write `data/vae/`: `autoencoder/`, history.csv, metrics.json, crops, figures.

    Raises:
        StageFailed: training diverged, weights or originals are missing, or a slice is empty.
    """
    try:
        job = slices_job(
            context.settings,
            root=context.root,
            training=context.input("slices", "vae.parquet"),
            held_out=context.input("slices", "eval.parquet"),
            state_dir=context.state_dir,
            export_dir=context.output_dir,
            metrics=context.metrics.path,
        )
    except ValueError as problem:
        raise StageFailed(f"vae: {problem}") from None
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
    return _describe(context.output_dir, context.settings.vae.steps)


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
