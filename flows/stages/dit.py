"""What the two DiT training stages share: assemble the job, run it, describe the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

from components.files.weight_folders import require_class, resolve_folder
from components.files.whole_files import write_text
from components.models.backbones import BACKBONES
from components.settings.models import AutoencoderSettings
from components.settings.training import DitStageSettings
from components.training.distributed.checkpoints import DiskFull
from components.training.distributed.supervision import TrainingRefused, restarts
from components.training.dit import curves as dit_curves
from components.training.dit.job import DitJob, TrainingDiverged
from components.training.dit.throughput import WAIT_WARNING
from components.training.dit.worker import run_job
from flows.stages.contract import StageContext, StageFailed, StageResult

TRANSFORMER_COMMANDS = {
    "flux": "hf download black-forest-labs/FLUX.1-dev --include 'transformer/*' "
    "--local-dir weights/FLUX.1-dev",
    "sd3": "hf download stabilityai/stable-diffusion-3-medium-diffusers --include 'transformer/*' "
    "--local-dir weights/stable-diffusion-3-medium",
}


def initial_weights(context: StageContext, settings: DitStageSettings) -> Path | None:
    """Folder of the weights that training starts from; None: the tiny random transformer.

    Raises:
        WeightsMissing: the pretrained folder is not there; names the command that gets it.
        StageFailed: stage 1 is told to start from itself, or the folder holds a transformer of
            another backbone.
    """
    backbone = context.settings.models.transformer.backbone
    if settings.initial_weights == "pretrained":
        named = context.settings.models.transformer.pretrained
        if named is None:
            return None
        command = TRANSFORMER_COMMANDS[backbone]
        folder = resolve_folder(context.root / named, f"{backbone} transformer", command)
        return _of_backbone(folder, backbone)
    if context.stage == "dit_stage1":
        raise StageFailed(
            f"dit_stage1.initial_weights = {settings.initial_weights}: stage 1 has no stage "
            "before it; set it to pretrained"
        )
    before = context.input("dit_stage1", settings.initial_weights.removeprefix("stage1_"))
    return _of_backbone(before, backbone)


def _of_backbone(folder: Path, backbone: str) -> Path:
    """The folder, if it holds a transformer of the backbone."""
    try:
        require_class(folder, None, BACKBONES[backbone].folder_classes)
    except ValueError as problem:
        raise StageFailed(
            f"models.transformer.backbone is {backbone}: {problem}; set the backbone of these "
            "weights, or other weights"
        ) from None
    return folder


def sample_autoencoder(
    context: StageContext, settings: DitStageSettings
) -> AutoencoderSettings | None:
    """The base autoencoder for sample grids (the trained one is made in parallel); None without.

    Pictures are no reason to stop: where its folder is missing a line says so.
    """
    autoencoder = context.settings.models.autoencoder
    if settings.samples.every is None or autoencoder.pretrained is None:
        return None if settings.samples.every is None else autoencoder
    folder = context.root / autoencoder.pretrained
    if not folder.is_dir():
        print(
            f"{context.stage}: no sample grids: there is no autoencoder in "
            f"{autoencoder.pretrained} (models.autoencoder.pretrained)",
            file=sys.stderr,
        )
        return None
    return autoencoder.model_copy(update={"pretrained": str(folder)})


def run_dit(
    context: StageContext, settings: DitStageSettings, train_slice: Path | None
) -> StageResult:
    """Train one SACL stage and write `data/<stage>/`.

    Files: `raw/` and `ema/` (transformer folders), `history.csv`, `validation.csv`,
    `metrics.json`, `curves.png`.

    Raises:
        StageFailed: training diverged, or the disk is full (a retry would do the same).
        TrainingFailed: a rank died more often than `runtime.max_restarts`; a retry goes on from
            the last checkpoint.
        CheckpointFailed: a checkpoint could not be written, and not for lack of room.
        ValueError: the inputs do not allow any training.
    """
    job = DitJob(
        name=context.stage,
        settings=settings,
        objective=context.settings.objective,
        transformer=context.settings.models.transformer,
        runtime=context.settings.runtime,
        seed=context.settings.project.seed,
        latents=context.input("latents", "index.parquet").parent,
        texts=context.input("text_embeddings", "index.parquet").parent,
        train_slice=train_slice,
        autoencoder=sample_autoencoder(context, settings),
        initial_weights=initial_weights(context, settings),
        state_dir=context.state_dir,
        export_dir=context.output_dir,
        metrics=context.metrics.path,
    )
    try:
        run_job(job)
    except (TrainingDiverged, DiskFull, TrainingRefused) as problem:
        raise StageFailed(str(problem)) from problem
    return _describe(context, job)


def _describe(context: StageContext, job: DitJob) -> StageResult:
    """Write tables and figure from the metric log."""
    rows = [row for row in context.metrics.rows() if row["step"] <= job.settings.steps]
    out = context.output_dir
    metrics = dit_curves.headline_metrics(rows, job.settings.sigma_range)
    tables = {
        "history.csv": dit_curves.history_table(rows),
        "validation.csv": dit_curves.validation_table(rows),
    }
    for name, table in tables.items():
        write_text(out / name, table.to_csv(index=False, lineterminator="\n"))
    dit_curves.draw_curves(rows, job.name, out / "curves.png")
    text = json.dumps(metrics, indent=2, sort_keys=True) + "\n"
    write_text(out / "metrics.json", text)
    waits = sum(1 for row in rows if WAIT_WARNING in row)
    restarted = restarts(job.state_dir)
    first, last = metrics["validation_loss_first"], metrics["validation_loss_last"]
    return StageResult(
        metrics=metrics,
        artifacts=(out / "curves.png", out / "history.csv", out / "validation.csv"),
        tags=_lineage(job)
        | {"data_wait.warnings": str(waits), "restarts": str(len(restarted))}
        | {f"restarts.{number}": str(failure) for number, failure in enumerate(restarted, 1)},
        summary=(
            f"{job.settings.steps} steps, validation loss {first:.4f} -> {last:.4f} "
            f"({-metrics['validation_loss_drop']:+.1%})"
            + (f"; waited too long for data, {waits} warnings" if waits else "")
            + (f"; {len(restarted)} restarts, last: {restarted[-1]}" if restarted else "")
        ),
    )


def _lineage(job: DitJob) -> dict[str, str]:
    """Digests of what the weights were trained on and of the weights themselves."""
    from components.files.weight_folders import folder_digest
    from components.training.stores.latent_store import LatentStore
    from components.training.stores.text_store import TextStore

    tags = {
        "latents.digest": LatentStore(job.latents).digest,
        "text_embeddings.digest": TextStore(job.texts).digest,
        "weights.raw": folder_digest(job.export_dir / "raw"),
        "weights.ema": folder_digest(job.export_dir / "ema"),
    }
    if job.train_slice is not None:
        tags["train_slice.images"] = str(len(pd.read_parquet(job.train_slice)))
    return tags
