"""Stage `vae`: decoder-only post-training of the base autoencoder on the high-detail slice."""

from __future__ import annotations

import json

from components.engine.ordered_pool import WorkersDoNotStart
from components.files.weight_folders import WeightsMissing, folder_digest
from components.training.distributed.checkpoints import DiskFull
from components.training.distributed.divergence import TrainingDiverged, read_events
from components.training.distributed.ranks import described_determinism
from components.training.distributed.supervision import TrainingRefused
from components.training.vae.crops import TilesDamaged
from components.training.vae.job import slices_job
from components.training.vae.tile_store import NoRoomForTiles
from components.training.vae.worker import run_job
from flows.stages.contract import StageContext, StageFailed, StageResult

TILES_FOLDER = "runs/vae_tiles"
"""Not below the state of a run: other learning rates, batches and seeds have the same tiles."""


def run(context: StageContext) -> StageResult:
    """Write `data/vae/`: `autoencoder/`, history.csv, metrics.json, left_out.csv, crops, figures.

    Raises:
        StageFailed: training diverged, weights or originals are missing, a slice is empty or holds
            no photograph that can be used, or a disk is full.
    """
    job = slices_job(
        context.settings,
        root=context.root,
        training=context.input("slices", "vae.parquet"),
        held_out=context.input("slices", "eval.parquet"),
        tiles_dir=context.root / TILES_FOLDER,
        state_dir=context.state_dir,
        export_dir=context.output_dir,
        metrics=context.metrics.path,
        begun_at=context.segments[-1].from_step if context.segments else 0,
    )
    try:
        run_job(job)
    except (
        DiskFull,
        TrainingDiverged,
        NoRoomForTiles,
        TilesDamaged,
        TrainingRefused,
        ValueError,
        WeightsMissing,
        WorkersDoNotStart,
    ) as problem:
        raise StageFailed(f"vae: {problem}") from problem
    return _describe(context)


def _describe(context: StageContext) -> StageResult:
    folder, settings = context.output_dir, context.settings
    divergences = read_events(context.state_dir)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    files = ("crops.png", "curves.png", "history.csv", "left_out.csv")
    left_out = [
        f"{metrics[f'left_out_{kind}']:.0f} {words}"
        for kind, words in (("narrow", "too narrow for a crop"), ("undecodable", "undecodable"))
        if metrics[f"left_out_{kind}"]
    ]
    return StageResult(
        metrics=metrics,
        artifacts=tuple(folder / name for name in files),
        tags={
            "weights.autoencoder": folder_digest(folder / "autoencoder"),
            "determinism": described_determinism(settings.runtime),
            **{f"divergence.{number}": str(event) for number, event in enumerate(divergences, 1)},
        },
        summary=(
            f"{settings.vae.steps} steps, held-out PSNR {metrics['psnr_before_db']:.2f} -> "
            f"{metrics['psnr_after_db']:.2f} dB ({metrics['psnr_gain_db']:+.2f})"
            + (f"; {len(divergences)} updates refused" if divergences else "")
            + (f"; left out: {', '.join(left_out)} (left_out.csv)" if left_out else "")
        ),
    )
