"""What the two DiT training stages share: settings to a job, the job run, its outcome reported."""

from __future__ import annotations

from pathlib import Path

from components.settings.training import DitStageSettings
from components.training.distributed.checkpoints import DiskFull
from components.training.distributed.divergence import TrainingDiverged
from components.training.distributed.interruption import advised_minutes
from components.training.distributed.optimizers import described_optimizer
from components.training.distributed.ranks import described_determinism
from components.training.distributed.supervision import TrainingRefused
from components.training.dit.curves import DitOutcome, write_outcome
from components.training.dit.job import StartUnusable, stage_job
from components.training.dit.worker import run_job
from components.training.sharded.hand_over import LearningLost
from flows.stages.contract import StageContext, StageFailed, StageResult


def run_dit(context: StageContext, train_slice: str, before: Path | None = None) -> StageResult:
    """Train one SACL stage and write `data/<stage>/`.

    Files: `raw/` and `ema/` (transformer folders), `history.csv`, `validation.csv`,
    `metrics.json`, `curves.png`.

    Args:
        context: of the stage.
        train_slice: file in `data/slices/` that names the training images.
        before: exported weights of the stage before.

    Raises:
        StageFailed: training diverged, the disk is full, or the weights to start from are none of
            this stage's (a retry would do the same).
        TrainingFailed: a rank died more often than `runtime.max_restarts`; a retry goes on from
            the last checkpoint.
        CheckpointFailed: a checkpoint could not be written, and not for lack of room.
        WeightsMissing: the pretrained folder is not there.
        ValueError: the inputs do not allow any training.
    """
    try:
        job = stage_job(
            context.stage,
            context.settings,
            root=context.root,
            latents=context.input("latents", "index.parquet").parent,
            texts=context.input("text_embeddings", "index.parquet").parent,
            train_slice=context.input("slices", train_slice),
            before=before,
            state_dir=context.state_dir,
            export_dir=context.output_dir,
            metrics=context.metrics.path,
            segments=context.segments,
        )
        run_job(job)
    # These end the stage; all others, such as a lost rank, are worth the retries of dvc.yaml.
    except (StartUnusable, TrainingDiverged, DiskFull, TrainingRefused, LearningLost) as problem:
        raise StageFailed(str(problem)) from problem
    return _result(context, job.settings, write_outcome(job))


def _result(context: StageContext, settings: DitStageSettings, outcome: DitOutcome) -> StageResult:
    folder, runtime = context.output_dir, context.settings.runtime
    metrics, waits, restarts = outcome.metrics, outcome.data_waits, outcome.restarts
    losses = f"{metrics['validation_loss_last']:.4f}"
    # Not there where the metric log has lost it.
    if (first := metrics.get("validation_loss_first")) is not None:
        losses = f"{first:.4f} -> {losses} ({-metrics['validation_loss_drop']:+.1%})"
    return StageResult(
        metrics=metrics,
        artifacts=tuple(folder / name for name in ("curves.png", "history.csv", "validation.csv")),
        tags=outcome.digests
        | {"optimizer": described_optimizer(settings)}
        | {"determinism": described_determinism(runtime)}
        | {"data_wait.warnings": str(waits), "restarts": str(len(restarts))}
        | {f"restarts.{number}": str(failure) for number, failure in enumerate(restarts, 1)}
        | {
            f"divergence.{number}": str(event)
            for number, event in enumerate(outcome.divergences, 1)
        }
        # The last of each kind speaks: a run may have been resumed many times.
        | {f"kept_movement.{h.where}": f"{h.kept:.6g}" for h in outcome.hand_overs}
        | _checkpoint_advice(outcome.checkpoint_stall_s, runtime.interruptions_per_day),
        summary=(
            f"{settings.steps} steps, validation loss {losses}"
            + (
                f", of training images {-metrics['training_images_loss_drop']:+.1%}"
                if "training_images_loss_drop" in metrics
                else ""
            )
            + (f"; the metric log lacks {outcome.missing}" if outcome.missing else "")
            + (f"; waited too long for data, {waits} warnings" if waits else "")
            + (f"; {len(outcome.divergences)} updates refused" if outcome.divergences else "")
            + (f"; {len(restarts)} restarts, last: {restarts[-1]}" if restarts else "")
        ),
    )


def _checkpoint_advice(stall_s: float | None, per_day: float | None) -> dict[str, str]:
    """What a checkpoint cost, and how often one would lose least time on machines like these."""
    if stall_s is None:
        return {}
    tags = {"checkpoint.stall_s": f"{stall_s:.3g}"}
    if per_day is not None and stall_s > 0:
        tags["checkpoint.advised_minutes"] = f"{advised_minutes(stall_s, per_day):.3g}"
    return tags
