"""Everything that decides a training run of the DiT, and how settings come to such a job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from components.files.weight_folders import (
    require_class,
    resolve_folder,
    weights_checksums,
    weights_identity,
)
from components.models.backbones import BACKBONES
from components.models.checkpoint_files import require_finite
from components.settings.models import AutoencoderSettings, TransformerSettings
from components.settings.objective import ObjectiveSettings
from components.settings.runtime import RuntimeSettings
from components.settings.schema import Settings
from components.settings.training import DitStageSettings
from components.training.distributed.run_states import Segment

WEIGHTS_NAMES = ("raw", "ema")


class StartUnusable(ValueError):
    """Training cannot start from what the settings name; one line."""


class DitJob(BaseModel):
    """Everything that decides a training run; travels to the ranks as JSON."""

    # Forbidden extras: a job file of another version must fail and not be half understood.
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Stage name, for progress and messages."""
    settings: DitStageSettings
    objective: ObjectiveSettings
    transformer: TransformerSettings
    runtime: RuntimeSettings
    seed: int
    latents: Path
    """Latent store."""
    texts: Path
    """Text store."""
    train_slice: Path | None
    """Parquet with image_id: train on these images only (None: all with split 'train')."""
    autoencoder: AutoencoderSettings | None
    """Decodes the sample grids, `pretrained` as a path from here; None: no grids."""
    initial_weights: Path | None
    """Transformer folder; None: the backbone's random tiny transformer."""
    state_dir: Path
    """Checkpoints, sample grids, and batches that made the loss diverge."""
    export_dir: Path
    """Where folders `raw` and `ema` are written."""
    metrics: Path
    """JSONL metric log."""
    segments: tuple[Segment, ...] = ()
    """Which steps ran under which settings, data and code; empty: all under these."""
    text_encoders: Path | None = None
    """Those that made the text store, for validation prompts of one's own; None: not known."""

    @property
    def changed_at(self) -> int | None:
        """Steps done when the newest segment began; None: nothing has changed under way."""
        return self.segments[-1].from_step if len(self.segments) > 1 else None


def build_transformer(job: DitJob, widths: tuple[int, int], latent_channels: int) -> Any:
    """The transformer that training starts from, float32.

    Raises:
        WeightsMissing: a file is not there.
        WeightsBroken: unreadable files, or tensors missing, unknown, misshapen or not finite.
    """
    backbone = BACKBONES[job.transformer.backbone]
    if job.initial_weights is not None:
        model = backbone.load(job.initial_weights, job.transformer)
        require_finite(model, job.initial_weights)
        return model
    # Keyed by the seed, so every rank builds the same weights without sending any.
    return backbone.build_tiny(job.transformer, widths, latent_channels, job.seed)


def start_identity(job: DitJob) -> str:
    """Identity of the weights that training starts from, or what random ones are made of."""
    if job.initial_weights is None:
        return f"random weights of seed {job.seed}"
    return weights_identity(weights_checksums(job.initial_weights))


def refuse_other_start(job: DitJob, began_with: str | None, found: str) -> None:
    """Compare the weights that training started from with those that are there now.

    Card, movement and the base of an adapter are told from these files when all is trained.

    Args:
        job: of the run.
        began_with: `start_identity` of then; None: an older checkpoint does not say.
        found: that of now.

    Raises:
        StartUnusable: they are others.
    """
    if began_with in (None, found):
        return
    where = "" if job.initial_weights is None else f" in {job.initial_weights}"
    raise StartUnusable(
        f"{job.name}: the initial weights{where} ({found}) are not those that this run began "
        f"with ({began_with}): put those back and run again, or begin again without the state in "
        f"{job.state_dir}"
    )


def stage_job(
    name: str,
    settings: Settings,
    *,
    root: Path,
    latents: Path,
    texts: Path,
    train_slice: Path | None,
    before: Path | None,
    state_dir: Path,
    export_dir: Path,
    metrics: Path,
    segments: tuple[Segment, ...] = (),
) -> DitJob:
    """The job of one SACL stage.

    Args:
        name: `dit_stage1` or `dit_stage2`, the section of the settings.
        settings: of the project.
        root: where relative weight folders start.
        latents: latent store.
        texts: text store.
        train_slice: see `DitJob`.
        before: exported weights of the stage before; None: there is none, or they are not wanted.
        state_dir: see `DitJob`.
        export_dir: see `DitJob`.
        metrics: see `DitJob`.
        segments: see `DitJob`.

    Raises:
        WeightsMissing: the pretrained folder is not there; names the command that gets it.
        StartUnusable: see `initial_weights`.
    """
    stage = {"dit_stage1": settings.dit_stage1, "dit_stage2": settings.dit_stage2}[name]
    encoders = settings.models.text_encoders.pretrained
    return DitJob(
        name=name,
        settings=stage,
        objective=settings.objective,
        transformer=settings.models.transformer,
        runtime=settings.runtime,
        seed=settings.project.seed,
        latents=latents,
        texts=texts,
        train_slice=train_slice,
        autoencoder=sample_autoencoder(name, stage, settings.models.autoencoder, root),
        initial_weights=initial_weights(name, stage, settings.models.transformer, root, before),
        state_dir=state_dir,
        export_dir=export_dir,
        metrics=metrics,
        segments=segments,
        # Tiny ones were built beside the store.
        text_encoders=texts / "encoders" if encoders is None else root / encoders,
    )


def initial_weights(
    name: str,
    settings: DitStageSettings,
    transformer: TransformerSettings,
    root: Path,
    before: Path | None,
) -> Path | None:
    """Folder of the weights that training starts from; None: the tiny random transformer.

    Args:
        name: of the stage.
        settings: of the stage.
        transformer: backbone, and where its released weights are.
        root: where relative weight folders start.
        before: exported weights of the stage before, if there is one.

    Raises:
        WeightsMissing: the pretrained folder is not there; names the command that gets it.
        StartUnusable: the stage is told to start from one before it and there is none, or the
            folder holds a transformer of another backbone.
    """
    # The other two values name what the stage before has exported.
    if settings.initial_weights != "pretrained":
        if before is None:
            raise StartUnusable(
                f"{name}.initial_weights = {settings.initial_weights}: stage 1 has no stage "
                "before it; set it to pretrained"
            )
        return _of_backbone(before, transformer.backbone)
    # Nothing to start from is a wish here, not an error: tests and small runs begin at random.
    if transformer.pretrained is None:
        return None
    # Looked for before anything starts, so that the command that fetches it is the first answer.
    folder = resolve_folder(
        root / transformer.pretrained,
        f"{transformer.backbone} transformer",
        BACKBONES[transformer.backbone].download("transformer"),
    )
    return _of_backbone(folder, transformer.backbone)


def _of_backbone(folder: Path, backbone: str) -> Path:
    """The folder, if it holds a transformer of the backbone."""
    try:
        # By the class in config.json: a folder of another backbone would fail at some missing
        # weight.
        require_class(folder, None, BACKBONES[backbone].folder_classes)
    except ValueError as problem:
        raise StartUnusable(
            f"models.transformer.backbone is {backbone}: {problem}; set the backbone of these "
            "weights, or other weights"
        ) from None
    return folder


def sample_autoencoder(
    name: str, settings: DitStageSettings, autoencoder: AutoencoderSettings, root: Path
) -> AutoencoderSettings | None:
    """The base autoencoder for sample grids (the trained one is made in parallel); None without.

    Pictures are no reason to stop: where its folder is missing a line says so.
    """
    # The tiny autoencoder is built from the seed and so needs no folder.
    if settings.samples.every is None or autoencoder.pretrained is None:
        return None if settings.samples.every is None else autoencoder
    folder = root / autoencoder.pretrained
    if not folder.is_dir():
        print(
            f"{name}: no sample grids: there is no autoencoder in "
            f"{autoencoder.pretrained} (models.autoencoder.pretrained)",
            file=sys.stderr,
        )
        return None
    # With the whole path: the job travels to ranks that know no root.
    return autoencoder.model_copy(update={"pretrained": str(folder)})
